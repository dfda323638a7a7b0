//! Messages on the session socket (`SOCK_SEQPACKET`: one message is one packet, so a message is
//! whole or it is an error). Descriptors travel beside a message as `SCM_RIGHTS`; each message says
//! how many belong to it.

use crate::limits::{MAX_DEVICES, MAX_ENTRY_POINT, MAX_NAME, MAX_TEXT};
use crate::size::Amount;
use crate::wire::{Reader, WireError, Writer};

/// A device as a process registers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cuDeviceGetUuid_v2`.
    pub uuid: [u8; 16],
    /// The device's memory in bytes, as the driver tells it.
    pub total_bytes: u64,
}

/// What a process asks for when it registers.
#[derive(Clone, Debug, PartialEq)]
pub struct Register {
    /// [`crate::PROTOCOL_VERSION`] of the process.
    pub version: u32,
    /// The workload's name; empty: the coordinator chooses one.
    pub workload: String,
    /// Guaranteed share; `None`: none was set.
    pub request: Option<Amount>,
    /// Burst ceiling; `None`: none was set.
    pub limit: Option<Amount>,
    /// Higher wins.
    pub priority: i32,
    /// `false`: `SPILLWAY_SWAP=never`.
    pub swap: bool,
    /// 0 for a first registration; else the session carries on after a coordinator's restart and
    /// this is the previous instance's id. One descriptor follows: the observed page.
    pub resumes: u64,
    /// Segments that [`FromProcess::Adopt`] messages will bring next; 0 unless it resumes.
    pub segments: u32,
    /// The grants that the process holds, per device, when it resumes; else zeros.
    pub grants: Vec<u64>,
    /// The host grant that the process holds, when it resumes; else 0.
    pub host_grant: u64,
    /// The epoch reached, when it resumes; commands of the new coordinator continue after it.
    pub epoch: u64,
    /// Devices in the process's order (`cuDeviceGet` ordinals).
    pub devices: Vec<DeviceInfo>,
}

/// Messages from a process to the coordinator.
#[derive(Clone, Debug, PartialEq)]
pub enum FromProcess {
    /// First message of every session.
    Register(Register),
    /// A host segment that the process holds since before the coordinator's restart. One descriptor.
    Adopt {
        /// The segment's id, unique within the session.
        id: u64,
        /// Its size in bytes.
        bytes: u64,
    },
    /// More memory is wanted than the grants allow. Answered by [`ToProcess::GrowReply`].
    Grow {
        /// Chosen by the process, echoed in the reply.
        ticket: u64,
        /// Index of the device in registration order.
        device: u32,
        /// `used` is to grow by this many bytes.
        bytes: u64,
        /// `pageable` is to grow by this many bytes, at most `bytes`.
        pageable: u64,
        /// Not 0: answer at once; do not wait for anybody's memory.
        no_wait: u32,
    },
    /// A host segment is wanted. Answered by [`ToProcess::SegmentReply`] once it is populated.
    Segment {
        /// Chosen by the process, echoed in the reply.
        ticket: u64,
        /// Bytes, a multiple of the granule, at most [`crate::MAX_SEGMENT`].
        bytes: u64,
    },
    /// The process has unmapped a segment and will not use it again.
    SegmentRelease {
        /// The segment's id.
        id: u64,
    },
    /// Bring `overhead`, `others` and `host_grant` of the desired page up to date. Answered by
    /// [`ToProcess::RefreshReply`].
    Refresh {
        /// Chosen by the process, echoed in the reply.
        ticket: u64,
        /// Not 0: measure overhead again, too (a context or module was made).
        measure: u32,
    },
    /// The observed page has news.
    Wake,
    /// Something a person should know; becomes an event.
    Note {
        /// One line.
        text: String,
    },
    /// This process is charged for memory that others may import. Since version 2.
    Hold {
        /// Index of the device in registration order.
        device: u32,
        /// Physical bytes, not 0.
        bytes: u64,
        /// Identifies the memory on the node; 0: only device and size are known.
        key: u64,
    },
    /// The process is charged for it no longer; one `Unhold` undoes one `Hold`. Since version 2.
    Unhold {
        /// As in `Hold`.
        device: u32,
        /// As in `Hold`.
        bytes: u64,
        /// As in `Hold`.
        key: u64,
    },
    /// This process imports memory: is somebody on the node charged for it already? Answered by
    /// [`ToProcess::ClaimReply`]. Since version 2.
    Claim {
        /// Chosen by the process, echoed in the reply.
        ticket: u64,
        /// As in `Hold`.
        device: u32,
        /// As in `Hold`.
        bytes: u64,
        /// As in `Hold`.
        key: u64,
    },
    /// The program asked for an entry point of the driver that the hook table does not know. Since
    /// version 2.
    Unknown {
        /// 1 to [`MAX_ENTRY_POINT`] letters, digits and `_`.
        name: String,
    },
}

/// Messages from the coordinator to a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToProcess {
    /// The registration stands. Two descriptors: the desired page, then the observed page (the
    /// process's own one, handed back, when it resumes).
    Welcome {
        /// [`crate::PROTOCOL_VERSION`] that the coordinator will speak.
        version: u32,
        /// This coordinator's instance id.
        instance: u64,
        /// The workload's name, given or chosen.
        workload: String,
    },
    /// The registration is refused.
    Refused {
        /// One line that says what to change.
        text: String,
    },
    /// The desired page has news.
    Wake,
    /// Answers `Grow`. The grants in the desired page are what counts: the process tries again.
    GrowReply {
        /// The ticket of the request.
        ticket: u64,
        /// One of the constants of [`outcome`].
        outcome: u32,
        /// Not 0: the host pool backs the pageable part; 0: allocate it pinned.
        backed: u32,
        /// For a refusal: one line with the numbers.
        text: String,
    },
    /// Answers `Segment`. One descriptor if `bytes` is not 0.
    SegmentReply {
        /// The ticket of the request.
        ticket: u64,
        /// The new segment's id.
        id: u64,
        /// Its size; 0: refused.
        bytes: u64,
        /// For a refusal: one line.
        text: String,
    },
    /// Answers `Refresh`.
    RefreshReply {
        /// The ticket of the request.
        ticket: u64,
    },
    /// Answers `Claim`.
    ClaimReply {
        /// The ticket of the request.
        ticket: u64,
        /// Not 0: somebody is charged for it already.
        covered: u32,
    },
}

/// Outcomes of `Grow`.
pub mod outcome {
    /// The grants were raised.
    pub const GRANTED: u32 = 0;
    /// The workload would pass its limit.
    pub const LIMIT: u32 = 1;
    /// Some workload could not run at all afterwards.
    pub const NEVER: u32 = 2;
    /// Nothing became free within the growth wait.
    pub const WAITED: u32 = 3;
    /// The request makes no sense (unknown device, zero or absurd size).
    pub const INVALID: u32 = 4;
}

mod kind {
    pub const REGISTER: u32 = 1;
    pub const ADOPT: u32 = 2;
    pub const GROW: u32 = 3;
    pub const SEGMENT: u32 = 4;
    pub const SEGMENT_RELEASE: u32 = 5;
    pub const REFRESH: u32 = 6;
    pub const WAKE: u32 = 7;
    pub const NOTE: u32 = 8;
    pub const HOLD: u32 = 9;
    pub const UNHOLD: u32 = 10;
    pub const CLAIM: u32 = 11;
    pub const UNKNOWN: u32 = 12;
    pub const WELCOME: u32 = 101;
    pub const REFUSED: u32 = 102;
    pub const GROW_REPLY: u32 = 103;
    pub const SEGMENT_REPLY: u32 = 104;
    pub const REFRESH_REPLY: u32 = 105;
    pub const WAKE_PROCESS: u32 = 106;
    pub const CLAIM_REPLY: u32 = 107;
}

fn write_amount(w: &mut Writer, amount: Option<Amount>) {
    match amount {
        None => w.u32(0).u64(0),
        Some(Amount::Bytes(bytes)) => w.u32(1).u64(bytes),
        Some(Amount::Fraction(share)) => w.u32(2).u64(share.to_bits()),
    };
}

fn read_amount(r: &mut Reader<'_>, field: &'static str) -> Result<Option<Amount>, WireError> {
    let (tag, word) = (r.u32(field)?, r.u64(field)?);
    match tag {
        0 => Ok(None),
        1 if word > 0 => Ok(Some(Amount::Bytes(word))),
        2 => {
            let share = f64::from_bits(word);
            if share > 0.0 && share <= 1.0 {
                Ok(Some(Amount::Fraction(share)))
            } else {
                Err(WireError::Invalid(field))
            }
        }
        _ => Err(WireError::Invalid(field)),
    }
}

impl Register {
    fn write(&self, w: &mut Writer) {
        // The version comes first for ever, so that any coordinator can refuse any process.
        w.u32(self.version).text(&self.workload, MAX_NAME);
        write_amount(w, self.request);
        write_amount(w, self.limit);
        w.i32(self.priority)
            .u32(u32::from(self.swap))
            .u64(self.resumes)
            .u32(self.segments);
        w.u64(self.host_grant).u64(self.epoch);
        w.u32(u32::try_from(self.devices.len()).unwrap_or(u32::MAX));
        for (index, device) in self.devices.iter().enumerate() {
            w.bytes(&device.uuid).u64(device.total_bytes);
            w.u64(self.grants.get(index).copied().unwrap_or(0));
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let version = r.u32("version")?;
        let workload = r.text(MAX_NAME, "workload")?;
        let request = read_amount(r, "request")?;
        let limit = read_amount(r, "limit")?;
        let priority = r.i32("priority")?;
        let swap = r.u32("swap")? != 0;
        let resumes = r.u64("resumes")?;
        let segments = r.u32("segments")?;
        let host_grant = r.u64("host grant")?;
        let epoch = r.u64("epoch")?;
        let count = r.u32("device count")? as usize;
        if count == 0 || count > MAX_DEVICES {
            return Err(WireError::Invalid("device count"));
        }
        let (mut devices, mut grants) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for _ in 0..count {
            devices.push(DeviceInfo {
                uuid: r.array("uuid")?,
                total_bytes: r.u64("total")?,
            });
            grants.push(r.u64("grant")?);
        }
        Ok(Self {
            version,
            workload,
            request,
            limit,
            priority,
            swap,
            resumes,
            segments,
            grants,
            host_grant,
            epoch,
            devices,
        })
    }
}

/// Whether a text can be the name of an entry point of the driver.
#[must_use]
pub fn valid_entry_point(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=MAX_ENTRY_POINT).contains(&name.len()) && name.bytes().all(letter)
}

impl FromProcess {
    /// The packet.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Register(register) => {
                w.u32(kind::REGISTER);
                register.write(&mut w);
            }
            Self::Adopt { id, bytes } => {
                w.u32(kind::ADOPT).u64(*id).u64(*bytes);
            }
            Self::Grow {
                ticket,
                device,
                bytes,
                pageable,
                no_wait,
            } => {
                w.u32(kind::GROW)
                    .u64(*ticket)
                    .u32(*device)
                    .u64(*bytes)
                    .u64(*pageable)
                    .u32(*no_wait);
            }
            Self::Segment { ticket, bytes } => {
                w.u32(kind::SEGMENT).u64(*ticket).u64(*bytes);
            }
            Self::SegmentRelease { id } => {
                w.u32(kind::SEGMENT_RELEASE).u64(*id);
            }
            Self::Refresh { ticket, measure } => {
                w.u32(kind::REFRESH).u64(*ticket).u32(*measure);
            }
            Self::Wake => {
                w.u32(kind::WAKE);
            }
            Self::Note { text } => {
                w.u32(kind::NOTE).text(text, MAX_TEXT);
            }
            Self::Hold { device, bytes, key } => {
                w.u32(kind::HOLD).u32(*device).u64(*bytes).u64(*key);
            }
            Self::Unhold { device, bytes, key } => {
                w.u32(kind::UNHOLD).u32(*device).u64(*bytes).u64(*key);
            }
            Self::Claim {
                ticket,
                device,
                bytes,
                key,
            } => {
                w.u32(kind::CLAIM).u64(*ticket);
                w.u32(*device).u64(*bytes).u64(*key);
            }
            Self::Unknown { name } => {
                w.u32(kind::UNKNOWN).text(name, MAX_ENTRY_POINT);
            }
        }
        w.0
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// It is truncated, has bytes too many, an unknown kind, or a field outside its range.
    pub fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader(packet);
        let message = match r.u32("kind")? {
            kind::REGISTER => Self::Register(Register::read(&mut r)?),
            kind::ADOPT => Self::Adopt {
                id: r.u64("id")?,
                bytes: r.u64("bytes")?,
            },
            kind::GROW => Self::Grow {
                ticket: r.u64("ticket")?,
                device: r.u32("device")?,
                bytes: r.u64("bytes")?,
                pageable: r.u64("pageable")?,
                no_wait: r.u32("no_wait")?,
            },
            kind::SEGMENT => Self::Segment {
                ticket: r.u64("ticket")?,
                bytes: r.u64("bytes")?,
            },
            kind::SEGMENT_RELEASE => Self::SegmentRelease { id: r.u64("id")? },
            kind::REFRESH => Self::Refresh {
                ticket: r.u64("ticket")?,
                measure: r.u32("measure")?,
            },
            kind::WAKE => Self::Wake,
            kind::NOTE => Self::Note {
                text: r.text(MAX_TEXT, "text")?,
            },
            kind::HOLD => Self::Hold {
                device: r.u32("device")?,
                bytes: r.u64("bytes")?,
                key: r.u64("key")?,
            },
            kind::UNHOLD => Self::Unhold {
                device: r.u32("device")?,
                bytes: r.u64("bytes")?,
                key: r.u64("key")?,
            },
            kind::CLAIM => Self::Claim {
                ticket: r.u64("ticket")?,
                device: r.u32("device")?,
                bytes: r.u64("bytes")?,
                key: r.u64("key")?,
            },
            kind::UNKNOWN => {
                let name = r.text(MAX_ENTRY_POINT, "name")?;
                if !valid_entry_point(&name) {
                    return Err(WireError::Invalid("name"));
                }
                Self::Unknown { name }
            }
            other => return Err(WireError::UnknownKind(other)),
        };
        r.end()?;
        Ok(message)
    }
}

impl ToProcess {
    /// The packet.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Welcome {
                version,
                instance,
                workload,
            } => {
                w.u32(kind::WELCOME)
                    .u32(*version)
                    .u64(*instance)
                    .text(workload, MAX_NAME);
            }
            Self::Refused { text } => {
                w.u32(kind::REFUSED).text(text, MAX_TEXT);
            }
            Self::Wake => {
                w.u32(kind::WAKE_PROCESS);
            }
            Self::GrowReply {
                ticket,
                outcome,
                backed,
                text,
            } => {
                w.u32(kind::GROW_REPLY)
                    .u64(*ticket)
                    .u32(*outcome)
                    .u32(*backed);
                w.text(text, MAX_TEXT);
            }
            Self::SegmentReply {
                ticket,
                id,
                bytes,
                text,
            } => {
                w.u32(kind::SEGMENT_REPLY)
                    .u64(*ticket)
                    .u64(*id)
                    .u64(*bytes)
                    .text(text, MAX_TEXT);
            }
            Self::RefreshReply { ticket } => {
                w.u32(kind::REFRESH_REPLY).u64(*ticket);
            }
            Self::ClaimReply { ticket, covered } => {
                w.u32(kind::CLAIM_REPLY).u64(*ticket).u32(*covered);
            }
        }
        w.0
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// It is truncated, has bytes too many, an unknown kind, or a field outside its range.
    pub fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader(packet);
        let message = match r.u32("kind")? {
            kind::WELCOME => Self::Welcome {
                version: r.u32("version")?,
                instance: r.u64("instance")?,
                workload: r.text(MAX_NAME, "workload")?,
            },
            kind::REFUSED => Self::Refused {
                text: r.text(MAX_TEXT, "text")?,
            },
            kind::WAKE_PROCESS => Self::Wake,
            kind::GROW_REPLY => Self::GrowReply {
                ticket: r.u64("ticket")?,
                outcome: r.u32("outcome")?,
                backed: r.u32("backed")?,
                text: r.text(MAX_TEXT, "text")?,
            },
            kind::SEGMENT_REPLY => Self::SegmentReply {
                ticket: r.u64("ticket")?,
                id: r.u64("id")?,
                bytes: r.u64("bytes")?,
                text: r.text(MAX_TEXT, "text")?,
            },
            kind::REFRESH_REPLY => Self::RefreshReply {
                ticket: r.u64("ticket")?,
            },
            kind::CLAIM_REPLY => Self::ClaimReply {
                ticket: r.u64("ticket")?,
                covered: r.u32("covered")?,
            },
            other => return Err(WireError::UnknownKind(other)),
        };
        r.end()?;
        Ok(message)
    }
}

#[cfg(test)]
mod tests;
