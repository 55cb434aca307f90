//! The wire: what sites and coordinator say to each other inside TLS. Pure bytes; sockets are elsewhere.
//!
//! ```text
//! frame     0            4       5
//!           | body: u32  | kind  | body …                            (little endian throughout)
//! kind  1   Hello      | protocol: u16 | postcard(Hello) |           first from a site, on every connection
//!       2   Welcome    | postcard(Welcome) |                         the answer, or
//!       3   Refused    | UTF-8 sentence |                            … the end of the connection
//!       4   Status     | postcard(Status) |                          site to coordinator, control connection
//!       5   Standing   | postcard(Standing) |                        coordinator to site, control connection
//!       6   Put        | digest: 32 | total: u64 | offset: u64 | bytes … |        data connections from here on, either way
//!       7   Have       | digest: 32 |                                all bytes of a put have arrived and fit
//!       8   Get        | digest: 32 | offset: u64 | length: u32 |
//!       9   Chunk      | digest: 32 | offset: u64 | bytes … |
//!      10   Missing    | digest: 32 |                                a get or put that cannot be served
//!      11   Ask        | postcard(Request) |                         at the desk, where gets are served too
//!      12   Answer     | postcard(Answer) |
//! ```
//!
//! A get of no bytes asks whether there are any: an empty chunk says yes, and a standby that is a little behind may take a moment
//! to say it. Connections that came to fetch carry gets and their answers only.
//!
//! A body is at most [`BODY_MAX`] bytes. Numbers of retired kinds are never used again. The protocol
//! number stands at a fixed place, so that any two versions can tell each other apart.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hash::Digest;
use crate::journal::Invitation;
use crate::round::{Standing, Status};
use crate::site::SiteId;

/// Version of everything on this page. Site and coordinator must have the same.
pub const PROTOCOL: u16 = 10;
/// Longest body of a frame.
pub const BODY_MAX: usize = 4 << 20;
/// Bytes of a payload per [`Frame::Put`] or [`Frame::Chunk`].
pub const CHUNK: usize = 32 << 10;
/// Bytes in front of every body.
pub const HEADER: usize = 5;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// To learn what the run is, then hang up or go on.
    Enlist,
    /// Status and standing.
    Control,
    /// Payloads.
    Data,
    /// To look at the run, to fetch the model, to administer.
    Desk,
    /// To get bytes by their address and nothing else, also from a coordinator that does not lead.
    Fetch,
}

/// What may be asked at the desk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How the run does.
    Look,
    /// Which weights are the model at this moment.
    Model,
    /// To invite the owner of the ticket whose secret has this hash. Administrators only.
    Invite(Digest, Invitation),
    /// To withdraw a site's tickets and to take its key off the list. Administrators only.
    Revoke(SiteId),
}

/// What is said to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The run's report, as JSON.
    Report(String),
    /// Content addresses of each fragment's weights as little-endian `f32`.
    Model(Vec<Digest>),
    /// It is done and in the journal.
    Done,
    /// It is not, for this reason.
    Refused(String),
}

/// How a site introduces itself; its key has been proven by the handshake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What for.
    pub purpose: Purpose,
    /// The secret of the site's ticket.
    pub secret: Option<[u8; 32]>,
    /// Fingerprint of the key that the site wants to have from now on instead of the one that it has just proven.
    pub successor: Option<Digest>,
    /// Fingerprint of its engine's layout, once it has one.
    pub layout: Option<Digest>,
    /// Its engine's name, for people.
    pub engine: String,
    /// Its device's name, for people.
    pub device: String,
}

/// What a site needs to know of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Name of the run.
    pub run: String,
    /// The name under which the site is known.
    pub site: SiteId,
    /// The run's configuration, as JSON.
    pub config: String,
    /// Fingerprint of the layout that all engines must have.
    pub layout: Digest,
    /// Content address of the tokenizer.
    pub tokenizer: Digest,
    /// Its bytes.
    pub tokenizer_bytes: u64,
    /// The site's latest session; the next one must be higher.
    pub session: u64,
    /// How often a coordinator took the run over. Whoever is in an earlier epoch than the site has seen leads no more.
    pub epoch: u64,
    /// Fingerprints of the keys by which coordinators of the run are known from now on: the one just proven, and the next one if
    /// there will be another. Nothing from whoever does not lead.
    pub keys: Vec<Digest>,
}

/// Anything that can be said.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the picture above says it")]
pub enum Frame {
    Hello { protocol: u16, hello: Option<Hello> },
    Welcome(Box<Welcome>),
    Refused(String),
    Status(Box<Status>),
    Standing(Box<Standing>),
    Put { digest: Digest, total: u64, offset: u64, bytes: Vec<u8> },
    Have(Digest),
    Get { digest: Digest, offset: u64, length: u32 },
    Chunk { digest: Digest, offset: u64, bytes: Vec<u8> },
    Missing(Digest),
    Ask(Request),
    Answer(Answer),
}

/// Bytes that are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The body is longer than any frame's.
    #[error("a frame of {0} bytes is longer than {BODY_MAX}")]
    TooLong(usize),
    /// No frame has this number.
    #[error("there is no frame of kind {0}")]
    UnknownKind(u8),
    /// The body is not what its kind calls for.
    #[error("a frame of kind {0} is malformed")]
    Malformed(u8),
}

impl Frame {
    /// The greeting of this version.
    pub fn hello(hello: Hello) -> Self {
        Frame::Hello { protocol: PROTOCOL, hello: Some(hello) }
    }

    /// Header and body.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, body) = match self {
            Frame::Hello { protocol, hello } => {
                let mut body = protocol.to_le_bytes().to_vec();
                body.extend(hello.as_ref().map(pack).unwrap_or_default());
                (1, body)
            }
            Frame::Welcome(welcome) => (2, pack(welcome)),
            Frame::Refused(why) => (3, why.clone().into_bytes()),
            Frame::Status(status) => (4, pack(status)),
            Frame::Standing(standing) => (5, pack(standing)),
            Frame::Put { digest, total, offset, bytes } => {
                (6, [&digest.0[..], &total.to_le_bytes(), &offset.to_le_bytes(), bytes].concat())
            }
            Frame::Have(digest) => (7, digest.0.to_vec()),
            Frame::Get { digest, offset, length } => {
                (8, [&digest.0[..], &offset.to_le_bytes(), &length.to_le_bytes()].concat())
            }
            Frame::Chunk { digest, offset, bytes } => (9, [&digest.0[..], &offset.to_le_bytes(), bytes].concat()),
            Frame::Missing(digest) => (10, digest.0.to_vec()),
            Frame::Ask(request) => (11, pack(request)),
            Frame::Answer(answer) => (12, pack(answer)),
        };
        let mut frame = Vec::with_capacity(HEADER + body.len());
        frame.extend((body.len() as u32).to_le_bytes());
        frame.push(kind);
        frame.extend(body);
        frame
    }

    /// Length of the body and kind from a header.
    ///
    /// # Errors
    /// If the body would be too long.
    pub fn header(header: [u8; HEADER]) -> Result<(usize, u8), WireError> {
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if length > BODY_MAX { Err(WireError::TooLong(length)) } else { Ok((length, header[4])) }
    }

    /// The frame of that kind and body.
    ///
    /// # Errors
    /// If there is none.
    pub fn decode(kind: u8, body: &[u8]) -> Result<Frame, WireError> {
        let mut fields = Fields { kind, rest: body };
        let frame = match kind {
            1 => {
                let protocol = u16::from_le_bytes(fields.take()?);
                // Another version's greeting need not look like ours.
                let hello = if protocol == PROTOCOL { Some(fields.unpack()?) } else { None };
                Frame::Hello { protocol, hello }
            }
            2 => Frame::Welcome(fields.unpack()?),
            3 => Frame::Refused(String::from_utf8_lossy(fields.rest).into_owned()),
            4 => Frame::Status(fields.unpack()?),
            5 => Frame::Standing(fields.unpack()?),
            6 => Frame::Put {
                digest: Digest(fields.take()?),
                total: u64::from_le_bytes(fields.take()?),
                offset: u64::from_le_bytes(fields.take()?),
                bytes: fields.rest.to_vec(),
            },
            7 => Frame::Have(Digest(fields.all()?)),
            8 => Frame::Get {
                digest: Digest(fields.take()?),
                offset: u64::from_le_bytes(fields.take()?),
                length: u32::from_le_bytes(fields.all()?),
            },
            9 => Frame::Chunk {
                digest: Digest(fields.take()?),
                offset: u64::from_le_bytes(fields.take()?),
                bytes: fields.rest.to_vec(),
            },
            10 => Frame::Missing(Digest(fields.all()?)),
            11 => Frame::Ask(fields.unpack()?),
            12 => Frame::Answer(fields.unpack()?),
            other => return Err(WireError::UnknownKind(other)),
        };
        Ok(frame)
    }
}

/// Takes a body apart from the front.
struct Fields<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self.rest.split_first_chunk().ok_or(WireError::Malformed(self.kind))?;
        self.rest = rest;
        Ok(*field)
    }

    fn all<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.rest.try_into().map_err(|_| WireError::Malformed(self.kind))
    }

    fn unpack<T: DeserializeOwned>(&self) -> Result<T, WireError> {
        match postcard::take_from_bytes(self.rest) {
            Ok((value, [])) => Ok(value),
            _ => Err(WireError::Malformed(self.kind)),
        }
    }
}

fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).expect("frames are plain data")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn again(frame: &Frame) -> Frame {
        let bytes = frame.encode();
        let (length, kind) = Frame::header(bytes[..HEADER].try_into().unwrap()).unwrap();
        assert_eq!(length, bytes.len() - HEADER);
        Frame::decode(kind, &bytes[HEADER..]).unwrap()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn hello() -> Hello {
        Hello {
            purpose: Purpose::Control,
            secret: None,
            successor: None,
            layout: Some(Digest([7; 32])),
            engine: "e".into(),
            device: "d".into(),
        }
    }

    #[test]
    fn frames_survive_the_trip() {
        let digest = Digest::of(b"x");
        let welcome = Welcome {
            run: "r".into(),
            site: "s".parse().unwrap(),
            config: "{}".into(),
            layout: digest,
            tokenizer: digest,
            tokenizer_bytes: 1 << 40,
            session: 9,
            epoch: 2,
            keys: vec![digest; 2],
        };
        let invitation =
            Invitation { site: "s".parse().unwrap(), role: crate::journal::Role::Observe, expires: Some(7) };
        let frames = [
            Frame::hello(hello()),
            Frame::Welcome(Box::new(welcome)),
            Frame::Refused("no".into()),
            Frame::Put { digest, total: 10, offset: 3, bytes: vec![1, 2] },
            Frame::Have(digest),
            Frame::Get { digest, offset: 1 << 33, length: 5 },
            Frame::Chunk { digest, offset: 0, bytes: vec![] },
            Frame::Missing(digest),
            Frame::Ask(Request::Invite(digest, invitation)),
            Frame::Ask(Request::Revoke("s".parse().unwrap())),
            Frame::Answer(Answer::Model(vec![digest; 3])),
        ];
        for frame in frames {
            assert_eq!(again(&frame), frame);
        }
    }

    #[test]
    fn the_bytes_are_these() {
        let layout = "07".repeat(32);
        assert_eq!(hex(&Frame::hello(hello()).encode()), format!("2a000000010a0001000001{layout}01650164"));
        let get = Frame::Get { digest: Digest([7; 32]), offset: 1, length: 2 };
        assert_eq!(hex(&get.encode()), format!("2c00000008{layout}010000000000000002000000"));
    }

    #[test]
    fn another_version_is_recognized_whatever_follows() {
        let frame = Frame::decode(1, &[99, 0, 0xff, 0xff]).unwrap();
        assert_eq!(frame, Frame::Hello { protocol: 99, hello: None });
    }

    #[test]
    fn lengths_are_checked_before_anything_is_allocated() {
        assert_eq!(Frame::header([0xff, 0xff, 0xff, 0xff, 1]), Err(WireError::TooLong(u32::MAX as usize)));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(kind in 0u8..13, body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = Frame::decode(kind, &body) {
                // What decodes can be said again, and means the same (NaN aside, which equals nothing).
                let text = format!("{frame:?}");
                prop_assert_eq!(format!("{:?}", again(&frame)), text);
            }
        }
    }
}
