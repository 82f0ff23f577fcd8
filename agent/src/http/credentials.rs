//! `POST /mcp/credentials/refresh/{ref}`: has an instance's secrets fetched again.

use axum::Json;
use axum::extract::State;
use dtma_api::secrets::RefreshAnswer;

use super::error::ApiError;
use super::table::{NAMED, Operation, Table};
use super::tools::failures::rejected;
use super::tools::params::Named;
use crate::reconcile::Instances;

pub(super) fn routes<T: Table>(table: T) -> T {
    table.post("/mcp/credentials/refresh/{ref}", refresh, || {
        Operation::new("Fetches an instance's secrets again and applies them")
            .described(
                "They are fetched again by themselves before they expire; this is for values that were changed at the backend. Files have \
                 the new values when this answers; a server that finds them in its environment is started anew where one has changed. An \
                 instance that is `needs_secrets` because they could not be fetched is started.",
            )
            .answers::<RefreshAnswer>(200, "They were fetched; never their values.")
            .fails(&NAMED)
            .fails(&[
                (409, "busy", "the instance is being removed"),
                (409, "nothing_to_fetch", "all its secrets came with its deploy, or it has none; `PUT /tools/{ref}` brings other values"),
                (502, "secrets_unavailable", "the backend did not give them; `error` says why. Those the instance has stay"),
            ])
    })
}

async fn refresh(State(instances): State<Instances>, Named(name): Named) -> Result<Json<RefreshAnswer>, ApiError> {
    let data = instances.refresh_secrets(&name).await.map_err(rejected)?;
    let message = match (data.changed, data.restarting) {
        (_, true) => format!("the secrets of {name} were fetched, and its server is being started with them"),
        (true, false) => format!("the secrets of {name} were fetched, and its files have the new values"),
        (false, false) => format!("the secrets of {name} were fetched, and are the same as before"),
    };
    Ok(Json(RefreshAnswer { success: true, message, data }))
}
