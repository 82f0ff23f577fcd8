//! Templates: what a deploy can ask for by name instead of spelling it out.
//!
//! A template is where a deploy's defaults come from, so that whatever the request says itself goes over it. The spec keeps what came
//! of it and not the name: a later agent may change a template without changing what is deployed.

use dtma_api::template::TemplateKind;

use super::network::Egress;
use super::spec::{Limits, Sandbox};

/// One template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Template {
    /// For a server that waits for somebody else most of the time.
    Small,
    /// What an instance gets when nothing is said.
    Standard,
    /// For a server that computes, or holds much in memory.
    Large,
    /// For a server that isn't trusted.
    Hardened,
}

/// What a spec has where the request says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Defaults {
    /// Upper bounds.
    pub limits: Limits,
    /// How it is shut in.
    pub sandbox: Sandbox,
    /// Where it may connect to.
    pub egress: Egress,
}

const MIB: u64 = 1024 * 1024;

impl Template {
    /// Every one there is.
    pub const ALL: [Self; 4] = [Self::Small, Self::Standard, Self::Large, Self::Hardened];

    /// The template called `name`.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|template| template.name() == name)
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Standard => "standard",
            Self::Large => "large",
            Self::Hardened => "hardened",
        }
    }

    /// What it decides; a deploy can have one of each kind.
    pub fn kind(self) -> TemplateKind {
        match self {
            Self::Small | Self::Standard | Self::Large => TemplateKind::Resources,
            Self::Hardened => TemplateKind::Hardening,
        }
    }

    /// What it is for, in a sentence.
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Small => "For a server that mostly waits for other services; several fit on the smallest droplet.",
            Self::Standard => "What an instance gets when nothing is said.",
            Self::Large => {
                "For a server that computes or holds much in memory; needs a droplet of 4 GB or more to be of use."
            }
            Self::Hardened => {
                "For a server that isn't trusted: it can write to /tmp only, which is held in memory, has no capabilities and reaches nothing; \
                 say egress {\"allow\": […]} for one that needs some places."
            }
        }
    }

    /// Puts its part into the defaults.
    pub fn apply(self, defaults: &mut Defaults) {
        let sized = |memory_bytes, nano_cpus, pids| Limits { memory_bytes, nano_cpus, pids };
        match self {
            Self::Small => defaults.limits = sized(128 * MIB, 250_000_000, 64),
            Self::Standard => defaults.limits = Limits::default(),
            Self::Large => defaults.limits = sized(2048 * MIB, 2_000_000_000, 1024),
            Self::Hardened => {
                defaults.sandbox = Sandbox {
                    read_only_root: true,
                    // Counts towards the memory limit, so a full one can't harm anybody else.
                    tmpfs: [("/tmp".to_owned(), "size=64m,mode=1777".to_owned())].into(),
                    ..Sandbox::default()
                };
                defaults.egress = Egress::None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_decides_what_its_kind_says_and_nothing_else() {
        for template in Template::ALL {
            let mut defaults = Defaults::default();
            template.apply(&mut defaults);
            assert_eq!(Template::named(template.name()), Some(template));
            match template.kind() {
                TemplateKind::Resources => {
                    assert_eq!(defaults, Defaults { limits: defaults.limits, ..Defaults::default() }, "{template:?}");
                }
                TemplateKind::Hardening => assert_eq!(defaults.limits, Limits::default(), "{template:?}"),
            }
        }
        assert_eq!(Template::named("Small"), None);
    }
}
