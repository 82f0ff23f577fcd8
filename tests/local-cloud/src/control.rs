//! `/control`: what no cloud offers. Faults on demand, the power switch and the network cable of a droplet, its console, and the log of
//! requests. Same token as the API, none of its limits.

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::{ApiError, App, is_operation};
use crate::cloud::Cloud;
use crate::droplet::DropletId;
use crate::faults::{Armed, Nonsense};
use crate::gate::{Gate, LoggedRequest, Violation};
use crate::host::{HostError, Power};
use crate::ledger::Filter;

/// Every route under `/control`.
pub fn router(app: &App) -> Router<App> {
    Router::new()
        .route("/control/faults", get(waiting).post(arm).delete(disarm))
        .route("/control/requests", get(requests))
        .route("/control/violations", get(violations))
        .route("/control/droplets", get(droplets))
        .route("/control/droplets/{id}/network", post(plug))
        .route("/control/droplets/{id}/power", post(switch))
        .route("/control/droplets/{id}/console", get(console))
        .route_layer(axum::middleware::from_fn_with_state(app.gate.clone(), admit))
}

/// A control request that could not be carried out.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error("there is no droplet {0}")]
    UnknownDroplet(DropletId),
    #[error(transparent)]
    Nonsense(#[from] Nonsense),
    #[error("{error}: {}", error.source)]
    Host {
        #[from]
        error: HostError,
    },
}

impl IntoResponse for ControlError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::UnknownDroplet(_) => StatusCode::NOT_FOUND,
            Self::Nonsense(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Host { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(json!({ "error": self.to_string() }))).into_response()
    }
}

async fn admit(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    if gate.admits(request.headers()) { next.run(request).await } else { ApiError::Unauthorized.into_response() }
}

async fn arm(State(gate): State<Gate>, Json(armed): Json<Armed>) -> Result<StatusCode, ControlError> {
    gate.book().faults.arm(armed, is_operation)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn waiting(State(gate): State<Gate>) -> Json<Vec<Armed>> {
    Json(gate.book().faults.waiting().cloned().collect())
}

async fn disarm(State(gate): State<Gate>) -> StatusCode {
    gate.book().faults.clear();
    StatusCode::NO_CONTENT
}

async fn requests(State(gate): State<Gate>) -> Json<Vec<LoggedRequest>> {
    Json(gate.book().requests.clone())
}

async fn violations(State(gate): State<Gate>) -> Json<Vec<Violation>> {
    Json(gate.book().violations.clone())
}

async fn droplets(State(cloud): State<Cloud>) -> Json<Value> {
    let now = cloud.now();
    let ledger = cloud.ledger();
    let droplets: Vec<Value> = ledger
        .all(&Filter::All)
        .into_iter()
        .map(|droplet| {
            let id = droplet.record.id;
            json!({
                "id": id, "name": droplet.record.name, "container": cloud.container_name(id), "ip": droplet.address(now),
                "status": droplet.status(),
            })
        })
        .collect();
    Json(droplets.into())
}

#[derive(Deserialize)]
struct Plug {
    connected: bool,
}

async fn plug(
    State(cloud): State<Cloud>,
    Path(id): Path<DropletId>,
    Json(plug): Json<Plug>,
) -> Result<StatusCode, ControlError> {
    known(&cloud, id)?;
    cloud.connect(id, plug.connected).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Switch {
    action: SwitchAction,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum SwitchAction {
    Cycle,
    Off,
    On,
}

/// Answers when it is done; nothing of it is seen in the API but the droplet's status.
async fn switch(
    State(cloud): State<Cloud>,
    Path(id): Path<DropletId>,
    Json(switch): Json<Switch>,
) -> Result<StatusCode, ControlError> {
    known(&cloud, id)?;
    let steps: &[Power] = match switch.action {
        SwitchAction::Cycle => &[Power::Cut, Power::On],
        SwitchAction::Off => &[Power::Cut],
        SwitchAction::On => &[Power::On],
    };
    cloud.change_power(id, steps).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn console(State(cloud): State<Cloud>, Path(id): Path<DropletId>) -> Result<String, ControlError> {
    known(&cloud, id)?;
    Ok(cloud.console(id).await?)
}

fn known(cloud: &Cloud, id: DropletId) -> Result<(), ControlError> {
    cloud.ledger().droplet(id).map(|_| ()).ok_or(ControlError::UnknownDroplet(id))
}
