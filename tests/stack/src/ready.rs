//! Addresses for new listeners, and waiting for them with a limit.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use dtma_api::Token;

use crate::command::tail_of;
use crate::error::{Result, StackError};
use crate::http;
use crate::process::ProcessRecord;

/// A port nobody listens on at this address. Free now, not reserved: whoever is given it binds it right away.
pub(crate) fn free_port(ip: IpAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((ip, 0)).map_err(StackError::io(format!("listen on {ip}")))?;
    listener.local_addr().map_err(StackError::io("read a listener's address"))
}

/// A port that is free at both addresses.
pub(crate) fn free_port_at_both(one: IpAddr, two: IpAddr) -> Result<(SocketAddr, SocketAddr)> {
    for _ in 0..20 {
        let first = free_port(one)?;
        let second = SocketAddr::new(two, first.port());
        if TcpListener::bind(second).is_ok() {
            return Ok((first, second));
        }
    }
    Err(StackError::InUse(format!("no port is free on both {one} and {two}")))
}

/// Waits until `url` answers 200, asked with `bearer` where one is given.
///
/// # Errors
/// When it doesn't within `limit`, or its process ends before; with the end of its log.
pub(crate) async fn wait_until_ok(
    url: &str,
    bearer: Option<&Token>,
    process: &ProcessRecord,
    limit: Duration,
) -> Result<()> {
    let client = http::client()?;
    let begun = Instant::now();
    loop {
        let mut request = client.get(url).timeout(Duration::from_secs(5));
        if let Some(bearer) = bearer {
            request = request.bearer_auth(bearer.expose());
        }
        let last = match request.send().await {
            Ok(response) if response.status() == 200 => return Ok(()),
            Ok(response) => {
                let status = response.status();
                format!("{url} answers {status}: {}", response.text().await.unwrap_or_default())
            }
            Err(error) => format!("{url}: {}", root_cause(&error)),
        };
        let alive = process.is_alive();
        if !alive || begun.elapsed() > limit {
            let last = if alive { last } else { "its process has ended".to_owned() };
            return Err(StackError::NotReady {
                what: process.name.clone(),
                waited: begun.elapsed(),
                last,
                log: process.log.clone(),
                tail: tail_of(&process.log, 20),
            });
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
