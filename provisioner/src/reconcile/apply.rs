//! Doing what the plan says, and writing down what came of it.

use dtma_api::Token;
use dtma_api::environment::EnvironmentError;
use jiff::Timestamp;
use std::time::Duration;
use uuid::Uuid;

use super::Reconciler;
use super::plan::{Step, delete_backoff};
use crate::board::ChangeError;
use crate::cloud::{CloudError, CreateError, CreateRequest, Refusal};
use crate::environment::{
    Attempt, Change, CreateOutcome, DropletId, Environment, Placement, Progress, State, after, attempt_tag, plain_error,
};
use crate::user_data::{self, ReleaseRef, UserData};

/// A one-time token works at most so long.
const TOKEN_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Before asking again where the cloud doesn't say when.
const RATE_LIMITED_WAIT: Duration = Duration::from_secs(2);
const UNREACHABLE_WAIT: Duration = Duration::from_secs(3);
/// Before trying again where the database didn't take a step.
const UNWRITABLE_WAIT: Duration = Duration::from_secs(1);

impl Reconciler {
    /// Applies one step that was planned for `row`.
    pub(super) async fn apply(&self, row: &Environment, step: Step) {
        match step {
            Step::Wait => {}
            Step::Become(change) => {
                self.commit(row, *change).await;
            }
            Step::Delete(droplets) => self.delete(row, &droplets).await,
            Step::Create { number, run_started_at } => self.create(row, number, run_started_at).await,
        }
    }

    /// Commits a change that was decided on exactly this row; if the row is another by now, nothing happens and it is planned anew.
    async fn commit(&self, row: &Environment, change: Change) -> bool {
        let outcome = self
            .board
            .change(row.id, Timestamp::now(), |now| (now.generation == row.generation).then(|| change.clone()))
            .await;
        match outcome {
            Ok((_, changed)) => changed,
            Err(error) => {
                not_written(row, &error).await;
                false
            }
        }
    }

    async fn create(&self, row: &Environment, number: u32, run_started_at: Timestamp) {
        let release = match self.releases.current().await {
            Ok(release) => release,
            Err(error) => {
                tracing::error!(error = %error, cause = std::error::Error::source(&error), "no release to install");
                return self
                    .give_up(row, "no_release", "The provisioner has no release of the agent to install.")
                    .await;
            }
        };
        let now = Timestamp::now();
        let (attempt, request) = match self.prepare(row, number, run_started_at, &release, now) {
            Ok(prepared) => prepared,
            Err(error) => {
                tracing::error!(error = %error, "no user data for a droplet");
                return self.give_up(row, "user_data", "The provisioner could not make the droplet's user data.").await;
            }
        };
        let attempt_id = attempt.id;
        let state = State::Provisioning { attempt, placement: Placement::Asked, progress: Progress::default() };
        // On disk before the cloud hears of it.
        if !self.commit(row, Change::told(state, "Asking the cloud for a droplet.")).await {
            return;
        }
        let give_up_at = after(run_started_at, self.policy.bootstrap_deadline);
        let answer = self.cloud.create(&request).await;
        let now = Timestamp::now();
        if let Err(error) = &answer {
            tracing::warn!(environment = %row.id, attempt = %attempt_id, error = %error, "the create gave no droplet");
        }
        let outcome = match answer {
            Ok(created) => CreateOutcome::Placed { droplet: created.droplet, action: created.action },
            Err(CreateError::Refused(refusal)) => {
                let code = if matches!(refusal.status, 401 | 403) { "cloud_unauthorized" } else { "cloud_refused" };
                CreateOutcome::Refused(worded(code, &refusal, now))
            }
            Err(CreateError::RateLimited(refusal)) => CreateOutcome::NotNow {
                not_before: after(now, refusal.retry_after.unwrap_or(RATE_LIMITED_WAIT)),
                error: worded("cloud_rate_limited", &refusal, now),
                give_up_at,
            },
            Err(CreateError::NotSent(_)) => CreateOutcome::NotNow {
                not_before: after(now, UNREACHABLE_WAIT),
                error: plain_error("cloud_unreachable", "The cloud could not be reached.", now),
                give_up_at,
            },
            Err(CreateError::Doubtful { .. }) => CreateOutcome::Doubtful,
        };
        // Should this fail, the row still says that the cloud was asked, and the next pass looks for the droplet.
        let written = self.board.change(row.id, now, |row| row.create_answered(attempt_id, &outcome, now)).await;
        if let Err(error) = written {
            not_written(row, &error).await;
        }
    }

    fn prepare(
        &self,
        row: &Environment,
        number: u32,
        run_started_at: Timestamp,
        release: &ReleaseRef,
        now: Timestamp,
    ) -> Result<(Attempt, CreateRequest), Unprepared> {
        let token = Token::generate().map_err(Unprepared::Token)?;
        let id = Uuid::new_v4();
        let attempt = Attempt {
            id,
            number,
            started_at: now,
            run_started_at,
            deadline: after(now, self.policy.bootstrap_deadline),
            token_hash: token.hash(),
            token_expires_at: after(now, TOKEN_LIFETIME),
        };
        let user_data = UserData { public_url: &self.public_url, enrolment_token: &token, release };
        let short = |id: Uuid| id.simple().to_string().split_at(8).0.to_owned();
        let request = CreateRequest {
            // For people; two may be alike. Only the tags identify.
            name: format!("dtma-{}-{}", short(row.id.0), short(id)),
            spec: row.spec.clone(),
            tags: vec![self.policy.fleet_tag.clone(), row.tag(), attempt_tag(id)],
            user_data: user_data::render(&user_data)?,
        };
        Ok((attempt, request))
    }

    async fn give_up(&self, row: &Environment, code: &str, message: &str) {
        let error = plain_error(code, message, Timestamp::now());
        self.commit(row, Change::told(State::ErrorProvisioning { error, leftover: None }, message)).await;
    }

    async fn delete(&self, row: &Environment, droplets: &[DropletId]) {
        let mut failure = None;
        for droplet in droplets {
            tracing::info!(environment = %row.id, droplet = droplet.0, "asking the cloud to delete a droplet");
            if let Err(error) = self.cloud.delete(*droplet).await {
                tracing::warn!(environment = %row.id, droplet = droplet.0, error = %error, "a delete failed");
                failure = Some(error);
            }
        }
        let now = Timestamp::now();
        let written = self
            .board
            .change(row.id, now, |row| match (&failure, &row.state) {
                (Some(error), State::Deprovisioning { cleanup, failures, .. }) => {
                    let failures = failures.saturating_add(1);
                    let error = delete_error(error, now);
                    let message = error.message.clone();
                    let retry_at = after(now, delete_backoff(failures));
                    let state = State::ErrorDeprovisioning { error, cleanup: cleanup.clone(), retry_at, failures };
                    Some(Change::told(state, message))
                }
                (_, state) => {
                    let mut state = state.clone();
                    state.cleanup_mut()?.delete_asked_at = Some(now);
                    Some(Change::quiet(state))
                }
            })
            .await;
        if let Err(error) = written {
            not_written(row, &error).await;
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Unprepared {
    #[error("no randomness for a token: {0}")]
    Token(getrandom::Error),
    #[error(transparent)]
    UserData(#[from] user_data::UserDataError),
}

fn worded(code: &str, refusal: &Refusal, at: Timestamp) -> EnvironmentError {
    EnvironmentError {
        cloud_request_id: refusal.request_id.clone(),
        ..plain_error(code, format!("The cloud refused: {}", refusal.message), at)
    }
}

fn delete_error(error: &CloudError, at: Timestamp) -> EnvironmentError {
    match error {
        CloudError::Refused { refusal, .. } => worded("cloud_refused", refusal, at),
        CloudError::Unreachable { .. } | CloudError::Unreadable { .. } | CloudError::Endless { .. } => {
            plain_error("cloud_unreachable", "The cloud gave no usable answer to a delete.", at)
        }
    }
}

/// The row is planned anew, from where it stands on disk; not at once, for a full disk says no quicker than it can be asked.
async fn not_written<E: std::fmt::Debug>(row: &Environment, error: &ChangeError<E>) {
    tracing::error!(environment = %row.id, error = ?error, "a step could not be written down; it is planned anew");
    tokio::time::sleep(UNWRITABLE_WAIT).await;
}
