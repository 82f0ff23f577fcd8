//! An HTTPS client that trusts exactly one TLS key: the one the provisioner says the agent has.

use std::sync::Arc;

use dtma_api::CertificatePin;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};

use crate::error::{Result, StackError};
use crate::http;

/// A client for the agent with this pin; any other key ends the handshake.
pub(crate) fn client(pin: CertificatePin) -> Result<reqwest::Client> {
    http::install_crypto();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(PinVerifier { pin, provider: Arc::clone(&provider) });
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    http::builder().tls_backend_preconfigured(config).build().map_err(StackError::http("make an HTTPS client"))
}

/// Name and validity of the certificate don't matter, its key does: that the peer holds the key is proved by the handshake's
/// signature, which is checked as always.
#[derive(Debug)]
struct PinVerifier {
    pin: CertificatePin,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, Error> {
        let key = ParsedCertificate::try_from(end_entity)?.subject_public_key_info();
        if CertificatePin::of_spki(&key) == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::PrivateKeyDer;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A TLS server that answers one request per connection; its pin and its address.
    async fn server() -> (CertificatePin, String) {
        http::install_crypto();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["somebody-else".to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        let pin = CertificatePin::of_spki(&rcgen::PublicKeyData::subject_public_key_info(&key));
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(socket).await else { continue };
                let mut request = [0; 1024];
                if stream.read(&mut request).await.is_ok() {
                    stream
                        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nOK")
                        .await
                        .unwrap();
                    stream.shutdown().await.unwrap();
                }
            }
        });
        (pin, url)
    }

    #[tokio::test]
    async fn the_pinned_key_is_trusted_under_any_name_and_no_other_key_is() {
        let (pin, url) = server().await;
        let reply = http::send("ask", client(pin).unwrap().get(&url)).await.unwrap();
        assert_eq!((reply.status, reply.text.as_str()), (200, "OK"));

        let other = CertificatePin::of_spki(b"another key");
        let error = http::send("ask", client(other).unwrap().get(&url)).await.unwrap_err();
        let StackError::Http { source, .. } = error else { panic!("{error}") };
        assert!(source.is_connect(), "{source:?}");
    }
}
