//! The listener: HTTP/1 connections that can also be closed without an answer.
//!
//! Stays below axum's own `serve` for that one reason: an answer marked [`Dropped`] makes the connection's service fail, and hyper then
//! closes the connection with nothing written.

use std::convert::Infallible;
use std::future::Future;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tower::ServiceExt;

use crate::api::{self, App};
use crate::gate::Dropped;
use crate::{control, gate};

/// Why a connection ends without an answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("a fault drops this connection")]
    Dropped,
    #[error("a handler did not finish")]
    Handler(#[from] tokio::task::JoinError),
}

/// Everything the server answers.
pub fn router(app: App) -> Router {
    let gate = axum::middleware::from_fn_with_state(app.gate.clone(), gate::pass);
    api::router().layer(gate).merge(control::router(&app)).with_state(app)
}

/// Serves until `stop`, then lets requests under way finish.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, app: App, stop: impl Future<Output = ()>) -> std::io::Result<()> {
    let router = router(app);
    let open = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted?.0,
            () = &mut stop => break,
        };
        let _ = stream.set_nodelay(true);
        let router = router.clone();
        let service = service_fn(move |request: hyper::Request<Incoming>| answer(router.clone(), request));
        let connection = open.watch(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %error, "a connection ended early");
            }
        });
    }
    open.shutdown().await;
    Ok(())
}

async fn answer(router: Router, request: hyper::Request<Incoming>) -> Result<axum::response::Response, NoAnswer> {
    let request: Request = request.map(Body::new);
    // In a task of its own: what a cloud was asked for it does, also when the caller hangs up meanwhile.
    let response = tokio::spawn(router.oneshot(request)).await?;
    let response = response.unwrap_or_else(|never: Infallible| match never {});
    if response.extensions().get::<Dropped>().is_some() { Err(NoAnswer::Dropped) } else { Ok(response) }
}
