//! TLS for the agent's port, from its own key.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use secrecy::ExposeSecret as _;
use tokio_rustls::TlsAcceptor;

use crate::store::identity::Identity;

/// The identity's key or certificate can't be used for TLS.
#[derive(Debug, thiserror::Error)]
#[error("the agent's TLS key or certificate is not usable")]
pub struct TlsError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// What makes TLS of an accepted connection. Offers HTTP/2 and HTTP/1.1. Needs the process's default crypto provider.
///
/// # Errors
/// When the stored key or certificate is none.
pub fn acceptor(identity: &Identity) -> Result<TlsAcceptor, TlsError> {
    let certificate = CertificateDer::from_pem_slice(identity.tls_certificate_pem().as_bytes());
    let key = PrivateKeyDer::from_pem_slice(identity.tls_key_pem().expose_secret().as_bytes());
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.map_err(|error| TlsError(error.into()))?],
            key.map_err(|error| TlsError(error.into()))?,
        )
        .map_err(|error| TlsError(error.into()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
