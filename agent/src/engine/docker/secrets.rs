//! How a container is given its secrets, with nothing of them in what Docker is told: Docker writes down what it is told.
//!
//! The folder of the values, which is in memory, is mounted read-only as a bind that has to be there, so that Docker itself starts no
//! container without it, as it would after a reboot. Where a server reads environment variables, a shell inside the container sets them
//! from these files and becomes the server's program: Docker's own list of variables is on its disk and in `docker inspect`.

use std::path::Path;

use bollard::models::{
    ContainerCreateBody, ImageInspect, Mount, MountBindOptions, MountBindOptionsPropagationEnum, MountType,
};

use crate::instance::{SecretForm, Spec};

/// Where servers find them.
pub(super) const FOLDER: &str = "/run/secrets";

/// Exports every file as a variable and becomes the command. `$(…)` takes ends of line off, as shells do. Drafts of files begin with a dot, and
/// no secret is called like the script's own variables. In an image
/// without a shell the container's init says so and ends with 127.
const EXPORT: &str = "for _dtma_f in /run/secrets/*; do [ -f \"$_dtma_f\" ] || continue; _dtma_v=$(cat \"$_dtma_f\") || exit 126; \
                      export \"${_dtma_f##*/}=$_dtma_v\"; done; unset _dtma_f _dtma_v; exec \"$@\"";

/// What an image starts by itself.
#[derive(Debug, Default)]
pub(super) struct Start {
    pub(super) entrypoint: Vec<String>,
    pub(super) command: Vec<String>,
}

impl Start {
    pub(super) fn of(image: ImageInspect) -> Self {
        let config = image.config.unwrap_or_default();
        Self { entrypoint: config.entrypoint.unwrap_or_default(), command: config.cmd.unwrap_or_default() }
    }
}

/// Whether it matters what the image starts by itself.
pub(super) fn wraps(spec: &Spec) -> bool {
    !spec.secrets.is_none() && spec.secrets.form == SecretForm::Environment
}

/// Adds to a container's description what gives it the secrets in `folder` of the host.
pub(super) fn give(body: &mut ContainerCreateBody, spec: &Spec, folder: &Path, image: Start) {
    if spec.secrets.is_none() {
        return;
    }
    let mount = Mount {
        target: Some(FOLDER.to_owned()),
        source: Some(folder.to_string_lossy().into_owned()),
        typ: Some(MountType::BIND),
        read_only: Some(true),
        bind_options: Some(MountBindOptions {
            // What is mounted on the host later has no business in there.
            propagation: Some(MountBindOptionsPropagationEnum::RPRIVATE),
            ..Default::default()
        }),
        ..Mount::default()
    };
    let host = body.host_config.get_or_insert_default();
    host.mounts.get_or_insert_default().push(mount);
    let variables = body.env.get_or_insert_default();
    for name in spec.secrets.promised() {
        let own = format!("{name}_FILE");
        if !spec.process.environment.0.contains_key(&own) {
            variables.push(format!("{own}={FOLDER}/{name}"));
        }
    }
    if wraps(spec) {
        // As Docker puts them together: whoever replaces the entry point doesn't get the image's command.
        let command = match (&spec.process.entrypoint, &spec.process.command) {
            (Some(entrypoint), command) => [entrypoint.clone(), command.clone().unwrap_or_default()].concat(),
            (None, Some(command)) => [image.entrypoint, command.clone()].concat(),
            (None, None) => [image.entrypoint, image.command].concat(),
        };
        body.entrypoint = Some(["/bin/sh", "-c", EXPORT, "secrets"].map(str::to_owned).to_vec());
        body.cmd = Some(command);
    }
}

#[cfg(test)]
mod tests {
    use super::super::make::{Place, container};
    use super::*;
    use crate::instance::spec::examples;
    use crate::instance::{DeploymentId, SecretSources};

    fn made(spec: &Spec) -> ContainerCreateBody {
        let mut body = container(spec, DeploymentId(uuid::Uuid::nil()), "main", Place::default());
        let image = Start { entrypoint: vec!["/entry".into()], command: vec!["default".into()] };
        give(&mut body, spec, Path::new("/run/dtma/secrets/main/1/files"), image);
        body
    }

    fn with_secrets(form: SecretForm) -> Spec {
        let secrets = SecretSources { given: [("API_KEY".parse().unwrap())].into(), form, ..SecretSources::default() };
        Spec { secrets, ..examples::spec("one") }
    }

    #[test]
    fn the_folder_is_mounted_read_only_and_has_to_be_there() {
        let body = made(&with_secrets(SecretForm::Files));
        let host = body.host_config.unwrap();
        // `binds` would have Docker make an empty folder in its place.
        assert_eq!(host.binds, None);
        let mounts = host.mounts.unwrap();
        assert_eq!((mounts[0].typ, mounts[0].read_only), (Some(MountType::BIND), Some(true)));
        assert_eq!(mounts[0].target.as_deref(), Some("/run/secrets"));
        assert_eq!(body.env.unwrap(), ["API_KEY_FILE=/run/secrets/API_KEY"]);
        assert_eq!((body.entrypoint, body.cmd), (None, None));
        let without = made(&examples::spec("one"));
        assert_eq!((without.host_config.unwrap().mounts, without.env.unwrap()), (None, vec![]));
    }

    #[test]
    fn variables_are_set_by_a_shell_that_becomes_what_would_have_been_started() {
        let mut spec = with_secrets(SecretForm::Environment);
        let command = |spec: &Spec| made(spec).cmd.unwrap();
        assert_eq!(command(&spec), ["/entry", "default"]);
        spec.process.command = Some(vec!["mine".into()]);
        assert_eq!(command(&spec), ["/entry", "mine"]);
        spec.process.entrypoint = Some(vec!["/other".into()]);
        assert_eq!(command(&spec), ["/other", "mine"]);
        spec.process.command = None;
        assert_eq!(command(&spec), ["/other"]);
        assert_eq!(made(&spec).entrypoint.unwrap()[..2], ["/bin/sh", "-c"]);
    }

    #[test]
    fn the_shell_sets_every_file_as_it_is_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let nasty = "a 'b' \"c\" $(d) `e` \\ *\nsecond line";
        for (name, value) in [("NASTY", nasty), ("f", "x"), (".draft", "not this")] {
            std::fs::write(folder.path().join(name), value).unwrap();
        }
        let script = EXPORT.replace(FOLDER, folder.path().to_str().unwrap());
        let show =
            ["sh", "-c", "printf '%s|%s|%s|' \"$NASTY\" \"$f\" \"$1\"; env | grep -c _dtma", "sh", "an argument"];
        let output =
            std::process::Command::new("/bin/sh").args(["-c", &script, "secrets"]).args(show).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{nasty}|x|an argument|0\n"));
    }
}
