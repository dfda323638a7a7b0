use super::*;

fn register() -> Register {
    Register {
        version: 1,
        workload: "mistral".into(),
        request: Some(Amount::Bytes(1 << 30)),
        limit: Some(Amount::Fraction(0.5)),
        priority: -3,
        swap: true,
        resumes: 9,
        segments: 2,
        grants: vec![5, 6],
        host_grant: 11,
        epoch: 4,
        devices: vec![
            DeviceInfo {
                uuid: [1; 16],
                total_bytes: 7,
            },
            DeviceInfo {
                uuid: [2; 16],
                total_bytes: 8,
            },
        ],
    }
}

fn from_process() -> Vec<FromProcess> {
    vec![
        FromProcess::Register(register()),
        FromProcess::Adopt { id: 1, bytes: 2 },
        FromProcess::Grow {
            ticket: 1,
            device: 2,
            bytes: 3,
            pageable: 4,
            no_wait: 1,
        },
        FromProcess::Segment {
            ticket: 1,
            bytes: 2,
        },
        FromProcess::SegmentRelease { id: 3 },
        FromProcess::Refresh {
            ticket: 4,
            measure: 1,
        },
        FromProcess::Wake,
        FromProcess::Note {
            text: "äöü".into()
        },
        FromProcess::Hold {
            device: 1,
            bytes: 2,
            key: 3,
        },
        FromProcess::Unhold {
            device: 1,
            bytes: 2,
            key: 0,
        },
        FromProcess::Claim {
            ticket: 5,
            device: 1,
            bytes: 2,
            key: 3,
        },
        FromProcess::Unknown {
            name: "cuNew_v2".into(),
        },
    ]
}

fn to_process() -> Vec<ToProcess> {
    vec![
        ToProcess::Welcome {
            version: 1,
            instance: 2,
            workload: "w".into(),
        },
        ToProcess::Refused { text: "no".into() },
        ToProcess::Wake,
        ToProcess::GrowReply {
            ticket: 1,
            outcome: 2,
            backed: 1,
            text: "t".into(),
        },
        ToProcess::SegmentReply {
            ticket: 1,
            id: 2,
            bytes: 3,
            text: String::new(),
        },
        ToProcess::RefreshReply { ticket: 7 },
        ToProcess::ClaimReply {
            ticket: 8,
            covered: 1,
        },
    ]
}

#[test]
fn every_message_survives_the_wire() {
    for message in from_process() {
        assert_eq!(FromProcess::decode(&message.encode()), Ok(message));
    }
    for message in to_process() {
        assert_eq!(ToProcess::decode(&message.encode()), Ok(message));
    }
}

#[test]
fn every_truncation_and_every_extra_byte_is_an_error() {
    for message in from_process() {
        let packet = message.encode();
        for cut in 0..packet.len() {
            assert!(
                FromProcess::decode(&packet[..cut]).is_err(),
                "{message:?} cut at {cut}"
            );
        }
        let mut longer = packet.clone();
        longer.push(0);
        assert_eq!(FromProcess::decode(&longer), Err(WireError::Trailing(1)));
    }
}

#[test]
fn nonsense_is_refused() {
    let mut bad = register();
    bad.devices.clear();
    assert!(FromProcess::decode(&FromProcess::Register(bad).encode()).is_err());
    let mut bad = register();
    bad.request = Some(Amount::Fraction(f64::NAN));
    assert!(FromProcess::decode(&FromProcess::Register(bad).encode()).is_err());
    assert_eq!(
        FromProcess::decode(&77u32.to_le_bytes()),
        Err(WireError::UnknownKind(77))
    );
}

#[test]
fn long_texts_are_cut_at_a_border() {
    let text = "ä".repeat(MAX_TEXT);
    match ToProcess::decode(&ToProcess::Refused { text }.encode()) {
        Ok(ToProcess::Refused { text }) => {
            assert!(text.len() <= MAX_TEXT && text.ends_with('ä'))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_of_entry_points_are_checked() {
    let decode = |name: &str| {
        let name = name.to_owned();
        FromProcess::decode(&FromProcess::Unknown { name }.encode())
    };
    assert!(decode("cuSome_thing_v2_ptsz").is_ok());
    for bad in ["", "cu Mem", "cu\u{1b}[31m", "cuMem\n", "cuÄ", "../x"] {
        assert_eq!(decode(bad), Err(WireError::Invalid("name")), "{bad:?}");
    }
    // Written by somebody who does not cut.
    let mut packet = 12u32.to_le_bytes().to_vec();
    let long = "c".repeat(MAX_ENTRY_POINT + 1);
    packet.extend(u32::try_from(long.len()).expect("short").to_le_bytes());
    packet.extend(long.as_bytes());
    assert_eq!(
        FromProcess::decode(&packet),
        Err(WireError::Invalid("name"))
    );
}
