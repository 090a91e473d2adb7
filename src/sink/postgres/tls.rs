//! TLS as libpq's `sslmode` has it.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tracing::warn;

use crate::config::{DatabaseHost, DatabaseTarget, SslMode};
use crate::regular_file;

/// A larger file holds no certificate and no key: the trusted certificates of a system have some 250 kB.
const PEM_BYTES_MAX: u64 = 16 << 20;

/// The TLS settings that the target asks for; `None` where it wants none, or where there is nothing but sockets.
pub(super) fn tls(target: &DatabaseTarget) -> Result<Option<ClientConfig>, String> {
    let ssl = &target.ssl;
    let local = target.hosts.iter().all(|host| matches!(host, DatabaseHost::Unix { .. }));
    if local || ssl.mode == SslMode::Disable {
        return Ok(None);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be set up: {error}"))?;
    let trusted = || {
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ssl.root_cert.as_deref())?), provider.clone())
            .build()
            .map_err(|error| format!("the trusted certificates can't be used: {error}"))
    };
    let verifier: Arc<dyn ServerCertVerifier> = match ssl.mode {
        SslMode::VerifyFull => trusted()?,
        SslMode::VerifyCa => Arc::new(Lenient { provider: provider.clone(), trusted: Some(trusted()?) }),
        SslMode::Disable | SslMode::Prefer | SslMode::Require => {
            Arc::new(Lenient { provider: provider.clone(), trusted: None })
        }
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let config = match &ssl.client {
        None => builder.with_no_client_auth(),
        Some(client) => builder
            .with_client_auth_cert(certificates(&client.cert)?, private_key(&client.key)?)
            .map_err(|error| format!("the client certificate {} can't be used: {error}", client.cert.display()))?,
    };
    Ok(Some(config))
}

/// Never used for a connection: a pool without TLS still wants a connector.
pub(super) fn no_tls() -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring supports TLS 1.3")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth()
}

/// The roots in `file`, else the system's.
fn roots(file: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) => {
            for certificate in certificates(file)? {
                roots
                    .add(certificate)
                    .map_err(|error| format!("the certificate in {} can't be used: {error}", file.display()))?;
            }
        }
        None => {
            let loaded = rustls_native_certs::load_native_certs();
            if loaded.certs.is_empty() {
                let cause = loaded.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
                return Err(format!("the system has no trusted certificates{cause}; set sslrootcert"));
            }
            let (_, ignored) = roots.add_parsable_certificates(loaded.certs);
            if ignored > 0 {
                warn!(ignored, "some of the system's certificates can't be used");
            }
        }
    }
    Ok(roots)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let problem = |error: &dyn fmt::Display| format!("could not read certificates from {}: {error}", file.display());
    let bytes = regular_file::read(file, PEM_BYTES_MAX).map_err(|error| problem(&error))?;
    let certificates =
        CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>().map_err(|error| problem(&error))?;
    if certificates.is_empty() { Err(problem(&"it holds none")) } else { Ok(certificates) }
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let problem = |error: &dyn fmt::Display| format!("could not read the private key {}: {error}", file.display());
    let bytes = regular_file::read(file, PEM_BYTES_MAX).map_err(|error| problem(&error))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| problem(&error))
}

/// A certificate for whatever name. With `trusted` it comes from a trusted root (libpq's `verify-ca`); without it is any one:
/// encryption without proof of who is there (`prefer`, `require`).
#[derive(Debug)]
struct Lenient {
    provider: Arc<CryptoProvider>,
    trusted: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(ServerCertVerified::assertion()) };
        match trusted.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
