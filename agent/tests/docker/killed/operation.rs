//! What is asked of an agent when it is killed, what it starts from, and what has to be there before and after.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use super::world::World;

/// What is promised of each instance, by its word in the test: its intent, and the value of `VERSION` in its environment.
pub(crate) type Promised = BTreeMap<&'static str, (&'static str, &'static str)>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Deploy,
    Stop,
    Start,
    Restart,
    Remove {
        volumes: bool,
    },
    Update,
    UpdateOfStopped,
    /// To a version that ends at once.
    UpdateThatFails,
    Group,
    /// An atomic one, of which one member ends at once.
    GroupThatFails,
    RemoveGroup,
    /// A session with a container of its own, from its beginning to its end.
    Session,
    /// The removal of an instance with such a session.
    RemoveWithSession,
}

impl Operation {
    /// Brings about what the operation starts from.
    pub(crate) async fn prepare(self, world: &World) {
        if self == Self::RemoveGroup {
            world.must(Method::POST, "/mcp/groups", Some(&group(world, "1")), 201).await;
        } else if self.has_sessions() {
            world.must(Method::POST, "/tools", Some(&world.per_session_body("one")), 201).await;
            if self == Self::RemoveWithSession {
                world.begin_session("one").await.expect("nobody killed it");
            }
        } else if !self.before().is_empty() {
            world.must(Method::POST, "/tools", Some(&world.deploy_body("one", "1")), 201).await;
        }
        if self.before().get("one").is_some_and(|(intent, _)| *intent == "stop") {
            let path = format!("/tools/{}/stop", world.host.name("one"));
            world.must(Method::POST, &path, None, 200).await;
        }
    }

    /// Asks for it; status and answer, unless the agent died meanwhile.
    pub(crate) async fn ask(self, world: &World, wait: &str) -> Option<(u16, Value)> {
        let path = format!("/tools/{}", world.host.name("one"));
        let (method, path, body) = match self {
            Self::Deploy => (Method::POST, "/tools".to_owned(), Some(world.deploy_body("one", "1"))),
            Self::Stop => (Method::POST, format!("{path}/stop"), None),
            Self::Start => (Method::POST, format!("{path}/start"), None),
            Self::Restart => (Method::POST, format!("{path}/restart"), None),
            Self::Remove { volumes } => (Method::DELETE, format!("{path}?volumes={volumes}"), None),
            Self::Update | Self::UpdateOfStopped => (Method::PUT, path, Some(world.deploy_body("one", "2"))),
            Self::UpdateThatFails => (Method::PUT, path, Some(world.deploy_body("one", "broken"))),
            Self::Group => (Method::POST, "/mcp/groups".to_owned(), Some(group(world, "1"))),
            Self::GroupThatFails => (Method::POST, "/mcp/groups".to_owned(), Some(group(world, "broken"))),
            Self::Session => {
                let session = world.begin_session("one").await?;
                return world.end_session("one", &session).await;
            }
            Self::RemoveWithSession => (Method::DELETE, format!("{path}?volumes=true"), None),
            Self::RemoveGroup => (Method::DELETE, format!("/mcp/groups/{}", world.host.name("team")), None),
        };
        let separator = if path.contains('?') { '&' } else { '?' };
        world.send(method, &format!("{path}{separator}{wait}"), body.as_ref()).await
    }

    /// Whether an answer is the one that is due.
    pub(crate) fn is_answered_by(self, status: u16, answer: &Value) -> bool {
        let failed = match self {
            Self::UpdateThatFails => "update_rolled_back",
            Self::GroupThatFails => "group_rolled_back",
            _ => return (200..300).contains(&status),
        };
        // 202 is for who didn't want to wait for the end.
        status == 202 || (status == 409 && answer["code"] == failed)
    }

    /// What is promised before.
    pub(crate) fn before(self) -> Promised {
        match self {
            Self::Deploy | Self::Group | Self::GroupThatFails => Promised::new(),
            Self::Start | Self::UpdateOfStopped => [("one", ("stop", "1"))].into(),
            Self::Stop
            | Self::Restart
            | Self::Remove { .. }
            | Self::Update
            | Self::UpdateThatFails
            | Self::Session
            | Self::RemoveWithSession => [("one", ("run", "1"))].into(),
            Self::RemoveGroup => [("one", ("run", "1")), ("two", ("run", "1"))].into(),
        }
    }

    /// What is promised once it has been accepted and carried out.
    pub(crate) fn after(self) -> Promised {
        match self {
            Self::Deploy | Self::Start | Self::Restart | Self::UpdateThatFails | Self::Session => {
                [("one", ("run", "1"))].into()
            }
            Self::Stop => [("one", ("stop", "1"))].into(),
            Self::Update | Self::UpdateOfStopped => [("one", ("run", "2"))].into(),
            Self::Group => [("one", ("run", "1")), ("two", ("run", "1"))].into(),
            Self::Remove { .. } | Self::GroupThatFails | Self::RemoveGroup | Self::RemoveWithSession => Promised::new(),
        }
    }

    fn has_sessions(self) -> bool {
        matches!(self, Self::Session | Self::RemoveWithSession)
    }

    /// Volumes stay although their instance goes.
    pub(crate) fn keeps_volumes(self) -> bool {
        matches!(self, Self::Remove { volumes: false } | Self::RemoveGroup)
    }
}

/// An atomic group of two, with a network of its own; `version` is the second one's.
fn group(world: &World, version: &str) -> Value {
    json!({
        "groupId": world.host.name("team"),
        "servers": [world.deploy_body("one", "1"), world.deploy_body("two", version)],
        "options": { "sharedNetworking": true, "atomic": true },
    })
}
