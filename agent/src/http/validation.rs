//! What can be found out before a deploy: `GET /mcp/templates`, `POST /mcp/validate`.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::handler::Handler as _;
use bytes::Bytes;
use dtma_api::instance::DeployRequest;
use dtma_api::template::TemplateList;
use dtma_api::validation::{NameOutlook, Outlook, Validation, ValidationAnswer, ValidationError};
use serde_json::json;

use super::App;
use super::error::ApiError;
use super::table::{Operation, Table};
use super::tools::{MAX_BODY, json as read_json, policy};
use crate::instance::{Review, Template, review};

pub(super) fn routes<T: Table>(table: T) -> T {
    table
        .get("/mcp/templates", templates, || {
            Operation::new("What a deploy's `template` can name")
                .described("What a deploy says itself goes over its templates.")
                .answers::<TemplateList>(200, "Every template this agent has.")
        })
        .post("/mcp/validate", validate.layer(DefaultBodyLimit::max(MAX_BODY)), || {
            Operation::new("Looks at a deploy without carrying it out")
                .described("200 also when the deploy is not valid. Nothing is changed and no registry is asked.")
                .takes::<DeployRequest>("The body of the deploy.")
                .example(
                    "hardened",
                    "A small server that isn't trusted",
                    json!({
                        "dockerImageUrl": "registry.example.com/calculator:1.4.0",
                        "instanceNameOnToolbox": "calculator",
                        "accountToolInstanceId": "6f0b3a52-1f0e-4d4e-9a55-6d2c2f6a9a10",
                        "mcpTransportType": "http",
                        "template": ["small", "hardened"],
                    }),
                )
                .answers::<ValidationAnswer>(
                    200,
                    "Every error and warning, what the deploy comes to, and what it would meet.",
                )
                .fails(&[
                    (400, "invalid_request", "the body is no JSON"),
                    (413, "invalid_request", "the body is longer than 1 MiB"),
                ])
        })
}

async fn templates() -> Json<TemplateList> {
    Json(TemplateList { success: true, data: Template::ALL.map(Template::view).to_vec() })
}

async fn validate(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ValidationAnswer>, ApiError> {
    let Review { spec, faults, forbidden, warnings } = review(&read_json(body)?, &policy(&app));
    let outlook = match &spec {
        Some(spec) => Some(app.parts().instances.foresee(spec).await),
        None => None,
    };
    let message = match &outlook {
        None => {
            format!("the deploy is not valid: {} {}", faults.len(), if faults.len() == 1 { "error" } else { "errors" })
        }
        Some(Outlook { clear: false, .. }) => "the deploy is valid, and something stands in its way now".to_owned(),
        Some(Outlook { name: NameOutlook::SameSpec, .. }) => "the same was deployed before".to_owned(),
        Some(Outlook { clear: true, .. }) => {
            "the deploy is valid, and nothing is seen that stands in its way".to_owned()
        }
    };
    let error = |fault| ValidationError { forbidden: forbidden.contains(&fault), fault };
    let data = Validation {
        valid: spec.is_some(),
        errors: faults.into_iter().map(error).collect(),
        warnings,
        spec: spec.map(|spec| spec.view()),
        outlook,
    };
    Ok(Json(ValidationAnswer { success: true, message, data }))
}
