//! Connections: TLS 1.3 over TCP, both sides authenticated by raw ed25519 public keys (RFC 7250), with
//! frames inside. The coordinator lets any key finish the handshake, because a new site's key is
//! unknown until its ticket is seen; a site accepts only the key that its ticket names, or those that it has been told of since.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use atoll_core::hash::Digest;
use atoll_core::wire::{BODY_MAX, CHUNK, Frame, HEADER};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
#[cfg(target_os = "linux")]
use socket2::{Domain, Socket, Type};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::coordinator::lock;
use crate::identity::Identity;

/// A handshake that takes longer is given up.
const HANDSHAKE_SECONDS: u64 = 15;

/// Site and coordinator each say something every second; silence for so long means that the other is gone,
/// even if the network did not say so.
pub const SILENCE_SECONDS: u64 = 30;

/// Longest greeting: names of engine and device, and little else.
const GREETING_MAX: usize = 16 << 10;

/// Bytes that crossed the network, TLS included.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Sent from here.
    pub sent: AtomicU64,
    /// Received here.
    pub received: AtomicU64,
}

/// A TLS connection whose bytes are counted.
pub type Link = TlsStream<Counted>;

/// A TCP connection that counts.
#[derive(Debug)]
pub struct Counted {
    tcp: TcpStream,
    /// Where it counts.
    pub traffic: Arc<Traffic>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.tcp).poll_read(cx, buf);
        self.traffic.received.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        poll
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let poll = Pin::new(&mut self.tcp).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = poll {
            self.traffic.sent.fetch_add(written as u64, Ordering::Relaxed);
        }
        poll
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Takes connections for the coordinator.
#[derive(Clone)]
pub struct Gate {
    acceptor: TlsAcceptor,
}

impl Gate {
    /// A gate that shows this identity.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(identity: &Identity) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let resolver = rustls::server::AlwaysResolvesServerRawPublicKeys::new(identity.certified.clone());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(KeyCheck::new(&provider, None)))
            .with_cert_resolver(Arc::new(resolver));
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Finishes the handshake; returns the connection and the fingerprint of the peer's key.
    ///
    /// # Errors
    /// If the peer does not prove a key.
    pub async fn accept(&self, tcp: TcpStream) -> Result<(Link, Digest)> {
        prepare(&tcp)?;
        let counted = Counted { tcp, traffic: Arc::new(Traffic::default()) };
        let link = within(HANDSHAKE_SECONDS, self.acceptor.accept(counted)).await??;
        let key = link.get_ref().1.peer_certificates().and_then(|keys| keys.first());
        let fingerprint = Digest::of(key.ok_or_else(|| anyhow!("the peer showed no key"))?);
        Ok((link.into(), fingerprint))
    }
}

/// Dials coordinators for a site.
#[derive(Clone)]
pub struct Dialer {
    connector: TlsConnector,
    keys: Keys,
    /// Bytes of all connections together.
    pub traffic: Arc<Traffic>,
}

impl Dialer {
    /// A dialer with this identity that accepts only the coordinator with that key, until it is told of [others](Self::trust).
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(identity: &Identity, coordinator: Digest) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let resolver = rustls::client::AlwaysResolvesClientRawPublicKeys::new(identity.certified.clone());
        let keys = Keys::new(Mutex::new(vec![coordinator]));
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(KeyCheck::new(&provider, Some(keys.clone()))))
            .with_client_cert_resolver(Arc::new(resolver));
        config.resumption = Resumption::disabled(); // Every handshake proves a key that is trusted then.
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), keys, traffic: Arc::default() })
    }

    /// Accepts coordinators with these keys from now on, and no others.
    pub fn trust(&self, keys: Vec<Digest>) {
        *lock(&self.keys) = keys;
    }

    /// Connects to `host:port`.
    ///
    /// # Errors
    /// If nobody answers there, or somebody with another key.
    pub async fn dial(&self, address: &str) -> Result<Link> {
        let tcp = within(HANDSHAKE_SECONDS, TcpStream::connect(address)).await?;
        let tcp = tcp.with_context(|| format!("no coordinator answers at {address}"))?;
        prepare(&tcp)?;
        let counted = Counted { tcp, traffic: self.traffic.clone() };
        let name = ServerName::try_from("coordinator").map_err(|error| anyhow!("{error}"))?;
        let link = within(HANDSHAKE_SECONDS, self.connector.connect(name, counted)).await?;
        Ok(link.with_context(|| format!("the handshake with {address} failed"))?.into())
    }
}

/// Says if this kernel does not pace what goes over long links: for processes that live long.
pub(crate) fn look_for_bbr() {
    #[cfg(target_os = "linux")]
    if let Err(error) =
        Socket::new(Domain::IPV4, Type::STREAM, None).and_then(|socket| socket.set_tcp_congestion(b"bbr"))
    {
        tracing::info!(
            "long or lossy links will carry less: this kernel does not let Atoll use BBR ({error})\n\
             hint: `modprobe tcp_bbr`, and name it in net.ipv4.tcp_allowed_congestion_control"
        );
    }
}

/// Small frames leave at once, and the kernel looks after idle connections whose other end is gone. Where it has BBR,
/// that paces what we send: it keeps the queues of thin links short, so that heartbeats pass, it does not take a lost
/// packet for a full link, and it does not start slowly again after each pause between two rounds.
fn prepare(tcp: &TcpStream) -> Result<()> {
    tcp.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    if let Err(error) = SockRef::from(tcp).set_tcp_congestion(b"bbr") {
        tracing::debug!("this kernel does not let us use BBR: {error}");
    }
    let probes = TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10));
    SockRef::from(tcp).set_tcp_keepalive(&probes)?;
    Ok(())
}

/// Whether a failure to connect is due to a wrong key, which no retry can mend.
pub fn is_foreign_key(error: &anyhow::Error) -> bool {
    format!("{error:#}").contains(FOREIGN_KEY)
}

const FOREIGN_KEY: &str = "the coordinator's key is not the one that the ticket names";

/// Waits for `future`, but not for ever.
///
/// # Errors
/// If it takes longer than `seconds`.
pub async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> Result<T> {
    match tokio::time::timeout(Duration::from_secs(seconds), future).await {
        Ok(done) => Ok(done),
        Err(_) => bail!("no answer within {seconds} seconds"),
    }
}

/// Reads a frame; `None` when the peer has hung up between two frames.
///
/// # Errors
/// If the bytes are no frame, or the connection breaks.
pub async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>> {
    read_frame_within(reader, BODY_MAX).await
}

/// Reads the first frame of whoever may be anybody: it is short.
///
/// # Errors
/// If the bytes are no frame, or a long one, or the connection breaks.
pub async fn read_greeting(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>> {
    read_frame_within(reader, GREETING_MAX).await
}

async fn read_frame_within(reader: &mut (impl AsyncRead + Unpin), longest: usize) -> Result<Option<Frame>> {
    let mut header = [0u8; HEADER];
    match reader.read_exact(&mut header[..1]).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    reader.read_exact(&mut header[1..]).await?;
    let (length, kind) = Frame::header(header)?;
    if length > longest {
        bail!("a frame of {length} bytes, where none has more than {longest}");
    }
    // Room is made for what comes, not for what is announced.
    let mut body = Vec::with_capacity(length.min(2 * CHUNK));
    reader.take(length as u64).read_to_end(&mut body).await?;
    if body.len() < length {
        bail!("the connection ended within a frame");
    }
    Ok(Some(Frame::decode(kind, &body)?))
}

/// Writes a frame and sends it on its way.
///
/// # Errors
/// If the connection breaks.
pub async fn write_frame(writer: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> Result<()> {
    writer.write_all(&frame.encode()).await?;
    writer.flush().await?;
    Ok(())
}

/// Checks that a peer owns its key and, at a site, that it is the coordinator's.
#[derive(Debug)]
struct KeyCheck {
    algorithms: WebPkiSupportedAlgorithms,
    pinned: Option<Keys>,
}

/// Keys that are accepted.
type Keys = Arc<Mutex<Vec<Digest>>>;

impl KeyCheck {
    fn new(provider: &CryptoProvider, pinned: Option<Keys>) -> Self {
        Self { algorithms: provider.signature_verification_algorithms, pinned }
    }

    fn check(&self, key: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        match &self.pinned {
            Some(pinned) if !lock(pinned).contains(&Digest::of(key)) => {
                Err(rustls::Error::General(FOREIGN_KEY.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
    }
}

/// TLS 1.2 is never negotiated.
fn too_old() -> rustls::Error {
    rustls::Error::General("TLS 1.3 is required".to_string())
}

/// What rustls asks of both verifiers in the same words: ed25519 raw keys, TLS 1.3 only.
macro_rules! key_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _key: &CertificateDer<'_>,
            _signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(too_old())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            self.signature(message, key, signature)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for KeyCheck {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(key).map(|()| ServerCertVerified::assertion())
    }

    key_signatures!();
}

impl ClientCertVerifier for KeyCheck {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(key).map(|()| ClientCertVerified::assertion())
    }

    key_signatures!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_core::wire::{Hello, Purpose};
    use tokio::net::TcpListener;

    fn identity(folder: &tempfile::TempDir, name: &str) -> Identity {
        Identity::load_or_create(&folder.path().join(name)).unwrap()
    }

    #[tokio::test]
    async fn both_sides_see_the_others_key_and_frames_cross() {
        let folder = tempfile::tempdir().unwrap();
        let (coordinator, site) = (identity(&folder, "c"), identity(&folder, "s"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let gate = Gate::new(&coordinator).unwrap();
        let server = tokio::spawn(async move {
            let (mut link, key) = gate.accept(listener.accept().await.unwrap().0).await.unwrap();
            (read_frame(&mut link).await.unwrap(), key)
        });
        let mut link = Dialer::new(&site, coordinator.fingerprint).unwrap().dial(&address).await.unwrap();
        let hello = Frame::hello(Hello {
            purpose: Purpose::Data,
            secret: None,
            successor: None,
            layout: None,
            engine: String::new(),
            device: String::new(),
        });
        write_frame(&mut link, &hello).await.unwrap();
        assert_eq!(server.await.unwrap(), (Some(hello), site.fingerprint));
    }

    #[tokio::test]
    async fn a_foreign_coordinator_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (coordinator, site) = (identity(&folder, "c"), identity(&folder, "s"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let gate = Gate::new(&coordinator).unwrap();
        tokio::spawn(async move { gate.accept(listener.accept().await.unwrap().0).await });
        let error = Dialer::new(&site, Digest::of(b"another")).unwrap().dial(&address).await.unwrap_err();
        assert!(is_foreign_key(&error), "{error:#}");
    }

    #[tokio::test]
    async fn a_dialer_can_come_to_trust_another_key() {
        let folder = tempfile::tempdir().unwrap();
        let (coordinator, site) = (identity(&folder, "c"), identity(&folder, "s"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let gate = Gate::new(&coordinator).unwrap();
        tokio::spawn(async move {
            loop {
                let _ = gate.accept(listener.accept().await.unwrap().0).await;
            }
        });
        let dialer = Dialer::new(&site, Digest::of(b"another")).unwrap();
        assert!(dialer.dial(&address).await.is_err());
        dialer.trust(vec![Digest::of(b"another"), coordinator.fingerprint]);
        dialer.dial(&address).await.unwrap();
        dialer.trust(vec![Digest::of(b"a third")]);
        assert!(is_foreign_key(&dialer.dial(&address).await.unwrap_err()));
    }
}
