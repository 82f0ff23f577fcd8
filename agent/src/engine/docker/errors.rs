//! What Docker's refusals mean. Docker has status codes for some and words for the rest; the words are matched here and nowhere else.

use bollard::errors::Error;

use crate::engine::EngineError;

fn refusal(error: &Error) -> Option<(u16, &str)> {
    match error {
        Error::DockerResponseServerError { status_code, message } => Some((*status_code, message)),
        _ => None,
    }
}

/// There is no such thing.
pub(super) fn is_missing(error: &Error) -> bool {
    refusal(error).is_some_and(|(status, _)| status == 404)
}

/// It isn't as it would have to be: running, or not used by anybody.
pub(super) fn is_conflict(error: &Error) -> bool {
    refusal(error).is_some_and(|(status, _)| status == 409)
}

/// A container is on the network that was to be removed.
pub(super) fn is_in_use(error: &Error) -> bool {
    refusal(error).is_some_and(|(_, message)| message.contains("has active endpoints"))
}

/// The place for a network was taken by another meanwhile.
pub(super) fn is_overlap(error: &Error) -> bool {
    refusal(error).is_some_and(|(_, message)| message.contains("Pool overlaps"))
}

/// The container's process is frozen.
pub(super) fn is_paused(error: &Error) -> bool {
    refusal(error).is_some_and(|(status, message)| status == 409 && message.contains("paused container"))
}

/// Somebody else is removing it.
pub(super) fn is_being_removed(error: &Error) -> bool {
    refusal(error).is_some_and(|(status, message)| status == 409 && message.contains("already in progress"))
}

/// What an error means for `operation`.
pub(super) fn sort(operation: &'static str, error: Error) -> EngineError {
    match error {
        Error::DockerResponseServerError { status_code, message } => sort_refusal(operation, status_code, message),
        Error::DockerStreamError { error } => EngineError::Failed { operation, message: error },
        Error::JsonDataError { message, .. } => EngineError::Failed { operation, message },
        error => EngineError::Unavailable { operation, source: Box::new(error) },
    }
}

fn sort_refusal(operation: &'static str, status: u16, message: String) -> EngineError {
    if message.contains("no space left on device") {
        return EngineError::NoSpace { operation };
    }
    if message.contains("port is already allocated") || message.contains("address already in use") {
        return EngineError::PortTaken { port: port_in(&message) };
    }
    match status {
        404 if message.contains("network") && message.contains("not found") => EngineError::NetworkGone { operation },
        // Docker has two of that name and attaches nothing to either.
        _ if message.contains("network") && message.contains("is ambiguous") => EngineError::NetworkGone { operation },
        404 if message.contains("No such image") => EngineError::ImageNotFound { message },
        404 if message.contains("No such container") => EngineError::ContainerGone { operation },
        409 if message.contains("is already in use by container") => EngineError::NameTaken,
        // A container being removed under us.
        409 if message.contains("removal") || message.contains("marked for removal") => {
            EngineError::ContainerGone { operation }
        }
        400..=499 => EngineError::Refused { operation, message },
        // A program or a folder that isn't in the image: Docker says 500 and means the request.
        _ if ["OCI runtime create failed", "runc create failed", "OCI runtime exec failed"]
            .iter()
            .any(|words| message.contains(words)) =>
        {
            EngineError::Refused { operation, message }
        }
        _ => EngineError::Failed { operation, message },
    }
}

/// The port in `… 127.0.0.1:8080 failed: port is already allocated` or `… 0.0.0.0:8080: bind: address already in use`.
fn port_in(message: &str) -> Option<u16> {
    let end = message.find(" failed: port is already").or_else(|| message.find(": bind: address already"))?;
    let (_, port) = message.get(..end)?.rsplit_once(':')?;
    port.parse().ok()
}

/// What an error means for a pull.
pub(super) fn sort_pull(error: Error) -> EngineError {
    let message = match error {
        Error::DockerResponseServerError { message, .. } | Error::DockerStreamError { error: message } => message,
        error => return sort("pull the image", error),
    };
    let says = |words: &[&str]| {
        let lower = message.to_ascii_lowercase();
        words.iter().any(|word| lower.contains(word))
    };
    if says(&["no space left on device"]) {
        EngineError::NoSpace { operation: "pull the image" }
    } else if says(&[
        "access denied",
        "unauthorized",
        "authentication required",
        "no basic auth credentials",
        "access to the resource is denied",
        "denied: ",
        "403 forbidden",
    ]) {
        EngineError::PullDenied { message }
    } else if says(&["manifest unknown", "not found", "name unknown", "no matching manifest", "does not exist"]) {
        EngineError::ImageNotFound { message }
    } else {
        EngineError::PullFailed { message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status_code: u16, message: &str) -> Error {
        Error::DockerResponseServerError { status_code, message: message.to_owned() }
    }

    #[test]
    fn dockers_own_words_are_understood() {
        let sorted = |status, message| sort("start", answer(status, message));
        assert!(matches!(
            sorted(
                500,
                "driver failed programming external connectivity on endpoint x (abc): Bind for 127.0.0.1:8080 failed: port is already allocated"
            ),
            EngineError::PortTaken { port: Some(8080) }
        ));
        assert!(matches!(
            sorted(500, "Error starting userland proxy: listen tcp4 127.0.0.1:8081: bind: address already in use"),
            EngineError::PortTaken { port: Some(8081) }
        ));
        assert!(matches!(
            sorted(
                409,
                "Conflict. The container name \"/x\" is already in use by container \"abc\". You have to remove"
            ),
            EngineError::NameTaken
        ));
        for (status, message) in
            [(404, "network 5e2b not found"), (400, "network dtma is ambiguous (2 matches found on name)")]
        {
            assert!(matches!(sorted(status, message), EngineError::NetworkGone { .. }), "{message}");
        }
        assert!(matches!(sorted(404, "No such container: abc"), EngineError::ContainerGone { .. }));
        assert!(matches!(sorted(404, "No such image: a:b"), EngineError::ImageNotFound { .. }));
        assert!(matches!(sorted(500, "write /x: no space left on device"), EngineError::NoSpace { .. }));
        assert!(matches!(
            sorted(400, "OCI runtime create failed: exec: \"nope\": executable file not found in $PATH"),
            EngineError::Refused { .. }
        ));
        assert!(matches!(sorted(500, "something broke"), EngineError::Failed { .. }));
        let gone = Error::IOError { err: std::io::Error::other("connection refused") };
        assert!(matches!(sort("start", gone), EngineError::Unavailable { .. }));
    }

    #[test]
    fn what_docker_says_of_networks_is_understood() {
        assert!(is_overlap(&answer(403, "Pool overlaps with other one on this address space")));
        assert!(is_in_use(&answer(403, "error while removing network: network x has active endpoints")));
        assert!(!is_in_use(&answer(404, "network x not found")));
    }

    #[test]
    fn a_pull_fails_for_reasons_a_caller_can_tell_apart() {
        let sorted = |message: &str| sort_pull(Error::DockerStreamError { error: message.to_owned() });
        assert!(matches!(
            sorted("pull access denied for x, repository does not exist or may require 'docker login'"),
            EngineError::PullDenied { .. }
        ));
        for words in [
            "Head \"http://r:5000/v2/x/manifests/1\": no basic auth credentials",
            "Head \"https://r/v2/x/manifests/1\": denied: denied",
            "unauthorized: incorrect username or password",
            "error parsing HTTP 403 response body: unexpected status: 403 Forbidden",
        ] {
            assert!(matches!(sorted(words), EngineError::PullDenied { .. }), "{words}");
        }
        assert!(matches!(
            sorted("manifest for r/x:1 not found: manifest unknown: manifest unknown"),
            EngineError::ImageNotFound { .. }
        ));
        assert!(matches!(
            sorted("Get http://r:5000/v2/: dial tcp 10.0.0.1:5000: connect: connection refused"),
            EngineError::PullFailed { .. }
        ));
        assert!(matches!(sorted("failed to register layer: no space left on device"), EngineError::NoSpace { .. }));
    }
}
