//! Everything that can go wrong while setting up, running or talking to a stack.

use std::path::PathBuf;
use std::time::Duration;

/// A failed step. Messages are for the person at the terminal; what a process wrote comes along where there is some.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// Set-up installs packages and droplets are containers with many rights.
    #[error("this needs root: run it as root (or with sudo -E)")]
    NotRoot,
    /// Packages are missing and there is no apt to install them with.
    #[error(
        "missing: {missing}; only Debian and Ubuntu are set up automatically, so install the like of these packages: {packages}"
    )]
    NoApt {
        /// What was looked for.
        missing: String,
        /// Debian's names of the packages.
        packages: String,
    },
    /// Packages were installed and a tool is still not there.
    #[error("installed {packages}, and still missing: {missing}")]
    StillMissing {
        /// What was looked for.
        missing: String,
        /// Debian's names of the packages.
        packages: String,
    },
    /// A command ended badly.
    #[error("`{command}` ended with {status}; its last lines ({}):\n{tail}", log.display())]
    Command {
        /// As it could be typed.
        command: String,
        /// Exit code or signal.
        status: String,
        /// Everything it wrote.
        log: PathBuf,
        /// The end of it.
        tail: String,
    },
    /// A file or a process could not be dealt with.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The Docker Engine refused or could not be reached.
    #[error("Docker: cannot {doing}: {source}")]
    Docker {
        /// What was tried.
        doing: String,
        /// Why not.
        source: bollard::errors::Error,
    },
    /// Docker did what was asked, and the result is not usable.
    #[error("Docker: {0}")]
    DockerAnswer(String),
    /// Something started and never became ready.
    #[error("{what} was not ready after {} s ({last}); the end of {}:\n{tail}", waited.as_secs(), log.display())]
    NotReady {
        /// What was waited for.
        what: String,
        /// For how long.
        waited: Duration,
        /// What the last look found.
        last: String,
        /// Its log.
        log: PathBuf,
        /// The end of it.
        tail: String,
    },
    /// A request did not get an answer.
    #[error("cannot {doing}: {source}")]
    Http {
        /// What was tried.
        doing: String,
        /// Why not.
        source: reqwest::Error,
    },
    /// A request got an answer that is no success.
    #[error("{doing} answered {status}: {body}")]
    Status {
        /// What was tried.
        doing: String,
        /// HTTP status code.
        status: u16,
        /// The answer's body.
        body: String,
    },
    /// An answer or a file does not hold what it should.
    #[error("cannot read {what}: {source}")]
    Json {
        /// What was read.
        what: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// TLS towards an agent could not be set up.
    #[error("cannot set up TLS that trusts the agent's pin: {0}")]
    Tls(#[from] rustls::Error),
    /// The MCP client could not do what was asked.
    #[error("MCP: {doing}: {problem}")]
    Mcp {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        problem: String,
    },
    /// No randomness for secrets.
    #[error("cannot make a secret: {0}")]
    Random(#[from] getrandom::Error),
    /// A second stack of the same name.
    #[error("{0}")]
    InUse(String),
}

impl StackError {
    /// For `map_err`: what was tried with a file or a process.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }

    pub(crate) fn docker(doing: impl Into<String>) -> impl FnOnce(bollard::errors::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Docker { doing, source }
    }

    /// For `map_err`: what was tried with a request.
    pub fn http(doing: impl Into<String>) -> impl FnOnce(reqwest::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Http { doing, source }
    }

    pub(crate) fn json(what: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        let what = what.into();
        move |source| Self::Json { what, source }
    }
}

/// What most of this crate answers with.
pub type Result<T> = std::result::Result<T, StackError>;
