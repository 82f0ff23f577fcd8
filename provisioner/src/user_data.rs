//! Renders the user data a droplet is created with, from the template and the script in `cloud-init/`.
//!
//! Owns the check that what goes in is inert in shell and YAML, and that what comes out is what DigitalOcean and cloud-init take.
//! The only secret in it is the one-time enrolment token.

use dtma_api::Token;
use secrecy::SecretString;

const TEMPLATE: &str = include_str!("../../cloud-init/user-data.yaml");
const BOOTSTRAP: &str = include_str!("../../cloud-init/bootstrap.sh");

/// Most bytes rendered user data may have. DigitalOcean takes 64 KiB; other clouds with cloud-init stop at 16.
pub const MAX_BYTES: usize = 16 * 1024;

/// What one droplet is told.
#[derive(Debug)]
pub struct UserData<'a> {
    /// Base URL at which the droplet reaches this provisioner, `http(s)://host[:port][/path]`.
    pub public_url: &'a str,
    /// The one-time token this droplet enrols with.
    pub enrolment_token: &'a Token,
    /// The agent it installs.
    pub release: &'a ReleaseRef,
}

/// A release as droplets fetch it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseRef {
    /// Its version, such as `0.1.0`.
    pub version: String,
    /// Where the archive is: an absolute `http(s)` URL that needs no credential.
    pub url: String,
    /// SHA-256 of the archive: 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// Why user data can't be rendered. Never quotes a value, since one of them is the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserDataError {
    /// A value could mean something to the shell or to YAML, or isn't what it should be.
    #[error("{variable} for a droplet's user data must be {expected}")]
    UnsafeValue {
        /// The template's name for it.
        variable: &'static str,
        /// What it must look like.
        expected: &'static str,
    },
    /// The template names something nobody fills in.
    #[error("the user data template has a variable nobody fills in: {0}")]
    UnknownVariable(String),
    /// Clouds have been seen to make unusable droplets of anything else.
    #[error("the user data must be ASCII")]
    NotAscii,
    /// Larger than [`MAX_BYTES`].
    #[error("the user data has {0} bytes, more than {MAX_BYTES}")]
    TooLarge(usize),
}

/// The `#cloud-config` text for one droplet. A slash at the end of the base URL is dropped.
///
/// # Errors
/// When a value isn't safe to embed, or the result isn't ASCII of at most [`MAX_BYTES`].
pub fn render(user_data: &UserData<'_>) -> Result<SecretString, UserDataError> {
    let UserData { public_url, enrolment_token, release } = user_data;
    let public_url = public_url.trim_end_matches('/');
    let token = enrolment_token.expose();
    check("PUBLIC_URL", "an http or https URL without spaces, quotes or `$`", is_url(public_url))?;
    check("ENROLMENT_TOKEN", "16 to 256 of `A-Za-z0-9_-`", is_token(token))?;
    check("RELEASE_VERSION", "a version such as 1.2.3", is_version(&release.version))?;
    check("RELEASE_URL", "an http or https URL without spaces, quotes or `$`", is_url(&release.url))?;
    check("RELEASE_SHA256", "64 lower-case hexadecimal digits", is_sha256(&release.sha256))?;

    let text = fill(TEMPLATE, |name| match name {
        "PUBLIC_URL" => Some(public_url),
        "ENROLMENT_TOKEN" => Some(token),
        "RELEASE_VERSION" => Some(&release.version),
        "RELEASE_URL" => Some(&release.url),
        "RELEASE_SHA256" => Some(&release.sha256),
        "BOOTSTRAP" => Some(BOOTSTRAP),
        _ => None,
    })?;
    if !text.is_ascii() {
        return Err(UserDataError::NotAscii);
    }
    if text.len() > MAX_BYTES {
        return Err(UserDataError::TooLarge(text.len()));
    }
    Ok(SecretString::from(text))
}

/// Replaces every `{{NAME}}`. A value of several lines keeps the indentation of the line it is named on, so that a whole file can
/// stand in a YAML block. Values are not looked through again.
fn fill<'v>(template: &str, value_of: impl Fn(&str) -> Option<&'v str>) -> Result<String, UserDataError> {
    let mut filled = String::with_capacity(MAX_BYTES);
    for line in template.lines() {
        let indentation: String = line.chars().take_while(|c| *c == ' ').collect();
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("{{") {
            let (name, after) = after.split_once("}}").unwrap_or((after, ""));
            let value = value_of(name).ok_or_else(|| UserDataError::UnknownVariable(name.to_owned()))?;
            filled.push_str(before);
            for (number, value_line) in value.lines().enumerate() {
                if number > 0 {
                    filled.push('\n');
                    if !value_line.is_empty() {
                        filled.push_str(&indentation);
                    }
                }
                filled.push_str(value_line);
            }
            rest = after;
        }
        filled.push_str(rest);
        filled.push('\n');
    }
    Ok(filled)
}

fn check(variable: &'static str, expected: &'static str, holds: bool) -> Result<(), UserDataError> {
    if holds { Ok(()) } else { Err(UserDataError::UnsafeValue { variable, expected }) }
}

fn is_url(text: &str) -> bool {
    let after_scheme = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    after_scheme.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:/[]%+?=&".contains(&b))
}

fn is_token(text: &str) -> bool {
    (16..=256).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn is_version(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
        && text.len() <= 64
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-+".contains(&b))
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;
    use serde_yaml_ng::Value;

    use super::*;

    const TOKEN: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA_";

    fn release() -> ReleaseRef {
        ReleaseRef {
            version: "0.1.0".to_owned(),
            url: "https://provisioner.example:3000/agent/v1/releases/0.1.0/dtma-agent.tar.gz".to_owned(),
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".to_owned(),
        }
    }

    fn rendered(public_url: &str, token: &str, release: &ReleaseRef) -> Result<String, UserDataError> {
        let token = Token::from(token.to_owned());
        render(&UserData { public_url, enrolment_token: &token, release }).map(|text| text.expose_secret().to_owned())
    }

    fn file<'v>(parsed: &'v Value, path: &str) -> &'v Value {
        let files = parsed["write_files"].as_sequence().unwrap();
        files.iter().find(|file| file["path"] == path).unwrap()
    }

    #[test]
    fn what_is_rendered_is_cloud_config_that_runs_the_script_as_it_is() {
        let text = rendered("https://provisioner.example:3000/", TOKEN, &release()).unwrap();
        assert!(text.starts_with("#cloud-config\n"));
        assert!(text.is_ascii() && text.len() <= MAX_BYTES, "{} bytes", text.len());

        let parsed: Value = serde_yaml_ng::from_str(&text).unwrap();
        let script = file(&parsed, "/run/dtma-bootstrap/bootstrap.sh");
        assert_eq!(script["content"], BOOTSTRAP);
        assert_eq!(script["permissions"], "0700");
        assert_eq!(parsed["runcmd"][0][1], "/run/dtma-bootstrap/bootstrap.sh");

        let settings = file(&parsed, "/run/dtma-bootstrap/settings");
        assert_eq!(settings["permissions"], "0600", "a string, or YAML makes another number of it");
        assert_eq!(
            settings["content"].as_str().unwrap(),
            format!(
                "PUBLIC_URL='https://provisioner.example:3000'\nENROLMENT_TOKEN='{TOKEN}'\nRELEASE_VERSION='0.1.0'\n\
                 RELEASE_URL='{}'\nRELEASE_SHA256='{}'\n",
                release().url,
                release().sha256
            )
        );
    }

    #[test]
    fn the_token_stands_in_one_place_and_nothing_is_left_to_fill_in() {
        let text = rendered("http://10.0.0.1:3000", TOKEN, &release()).unwrap();
        assert_eq!(text.matches(TOKEN).count(), 1);
        assert!(!text.contains("{{") && !text.contains("}}"));
    }

    #[test]
    fn values_that_could_mean_something_to_shell_or_yaml_are_refused() {
        let hostile = [
            "x'; rm -rf / #",
            "$(id)",
            "`id`",
            "a\nb: c",
            "a\r\nb",
            "\"",
            "a b",
            "{{PUBLIC_URL}}",
            "- a",
            "&a",
            "*a",
            "!!tag",
            "",
            "é",
            "\u{0}",
            "..",
            "|",
            "%0A;id",
            "a\tb",
            "\\",
        ];
        for bad in hostile {
            let with = |version: &str, url: &str, sha256: &str| ReleaseRef {
                version: version.to_owned(),
                url: url.to_owned(),
                sha256: sha256.to_owned(),
            };
            let good = release();
            let url = format!("https://host/{bad}");
            let refused = |result: Result<String, UserDataError>| match result {
                Err(UserDataError::UnsafeValue { variable, .. }) => Some(variable),
                _ => None,
            };
            assert_eq!(refused(rendered(bad, TOKEN, &good)), Some("PUBLIC_URL"), "{bad:?}");
            assert_eq!(refused(rendered("https://host", bad, &good)), Some("ENROLMENT_TOKEN"), "{bad:?}");
            let token = format!("{TOKEN}{bad}");
            if !bad.is_empty() {
                assert_eq!(refused(rendered("https://host", &token, &good)), Some("ENROLMENT_TOKEN"), "{bad:?}");
            }
            assert_eq!(
                refused(rendered("https://host", TOKEN, &with(bad, &good.url, &good.sha256))),
                Some("RELEASE_VERSION"),
                "{bad:?}"
            );
            assert_eq!(
                refused(rendered("https://host", TOKEN, &with(&good.version, &good.url, bad))),
                Some("RELEASE_SHA256"),
                "{bad:?}"
            );
            // In a path, a few of them are harmless between single quotes; then they come out as they went in.
            match rendered("https://host", TOKEN, &with(&good.version, &url, &good.sha256)) {
                Ok(text) => assert!(text.contains(&format!("RELEASE_URL='{url}'")), "{bad:?}"),
                Err(error) => {
                    assert!(matches!(error, UserDataError::UnsafeValue { variable: "RELEASE_URL", .. }), "{bad:?}")
                }
            }
        }
        for scheme in ["ftp://host", "//host", "host", "https://", "https:///path", "file:///etc/passwd"] {
            assert!(rendered(scheme, TOKEN, &release()).is_err(), "{scheme}");
        }
    }

    #[test]
    fn an_error_never_quotes_the_token() {
        let secret = "secret with spaces in it, long enough";
        let error = rendered("https://host", secret, &release()).unwrap_err();
        assert!(!format!("{error} {error:?}").contains(secret));
    }

    #[test]
    fn a_variable_nobody_fills_in_is_named() {
        assert_eq!(fill("a {{NEW}}", |_| None), Err(UserDataError::UnknownVariable("NEW".to_owned())));
    }

    #[test]
    fn every_line_of_a_value_keeps_the_indentation_and_values_are_not_filled_again() {
        let filled = fill("  x: |\n    {{A}}\n", |_| Some("one\n\n  {{A}}\n")).unwrap();
        assert_eq!(filled, "  x: |\n    one\n\n      {{A}}\n");
    }

    #[test]
    fn the_readme_names_every_variable_of_the_template() {
        let readme = include_str!("../../cloud-init/README.md");
        for part in TEMPLATE.split("{{").skip(1) {
            let (name, _) = part.split_once("}}").unwrap();
            assert!(readme.contains(&format!("`{name}`")), "{name}");
        }
    }
}
