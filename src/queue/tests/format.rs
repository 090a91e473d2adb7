//! What stands in a segment, byte for byte. A test that fails here is not to be adapted: the bytes are on people's disks.

use super::*;
use crate::queue::codec::{self, CodecError, Content, Letter};
use crate::queue::piece::{BlockBuilder, Marks, Piece, Totals};

const EVENT: &str = "01abd4c1c70100b49376e2fa180000000000000000020000004022a59619de5b93a9d0467b28aea5943fcd853dfe9c971700000000000000000d000000000000007475726e5f64657465637465640107000000000001ffffffff0000000015000000000000002f686f6d652f736f6d656f6e652f612e6a736f6e6c2a000000000000001a000000000000007b226e756d626572223a34322c2274657874223a22787878227d";
const INPUT: &str = "0191e01fad0101000000000000007402000000000102030405060708090a0b0c0d0e0f020000000000000000fe";
const LETTER: &str = "01e09d500d0100b49376e2fa18000000000000000004000000010000000300000005000000000000006e6f20c3a90105000000000000003232503035";
const CURSOR: &str = "01890e7efc05000000000000002f742fc3a90100000000000000020000000000000007000000000000006300000000000000010d000000000000002f686f6d652f736f6d656f6e65010500000000000000000000000000000001faffffffffffffffffffffffffffffff000107000000";

/// A block of an event, whose record goes on elsewhere, and a rejection.
const BLOCK: &str = "687771316500000000000000050000000000000000000000070021e6ac18aa0000000000000003000000000000012c0002000023280003000000000000616263";
const CHUNK: &str = "687771317800000000000000050000000100000000000000070003e91ba0ac646566";
const MARK: &str = "687771316d00000000000000060000000000000000000000070028f1443b5a0000000000000004000000000000245400000000000000050000000000000003000000000000012c";

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn captured_at() -> Timestamp {
    Timestamp::from_nanosecond(1_800_000_000_000_000_001).unwrap()
}

fn letter() -> Letter {
    let failure = Failure { kind: FailureKind::Refused, message: "no é".into(), sqlstate: Some("22P05".into()) };
    Letter { failed_at: captured_at(), failure, content: Content::Input, attempts: 4 }
}

fn full_cursor() -> Cursor {
    let time = |nanoseconds| Some(Timestamp::from_nanosecond(nanoseconds).unwrap());
    let session = SessionState { began_at: time(5), last_activity: time(-6), ended_through: None, process: Some(7) };
    Cursor { session, ..cursor(7) }
}

#[test]
fn records_are_written_and_read_as_they_always_were() {
    let event = event(42, 3);
    assert_eq!(hex(&codec::encode_event(&event, captured_at(), 2).unwrap()), EVENT);
    let stored = codec::decode_event(&bytes(EVENT)).unwrap();
    assert_eq!(stored, codec::StoredEvent { event, captured_at: captured_at(), attempts: 2 });
    assert_eq!(codec::captured_at(&bytes(EVENT)[..40]).unwrap(), captured_at());

    let rejection = Rejection { event_type: Some(EventType::new("t")), origin: Origin::Http, ..rejection(b"\0\xff") };
    assert_eq!(codec::decode_input(&bytes(INPUT), rejection.failure.clone()).unwrap(), rejection);
    // Masked, differently each time.
    let [one, other] = [0, 1].map(|_| codec::encode_input(&rejection, &rejection.bytes).unwrap());
    assert_ne!(one, other);
    assert_eq!(codec::decode_input(&one, rejection.failure.clone()).unwrap(), rejection);

    assert_eq!(hex(&codec::encode_letter(&letter()).unwrap()), LETTER);
    assert_eq!(codec::decode_letter(&bytes(LETTER)).unwrap(), letter());

    let path = Path::new("/t/é");
    assert_eq!(hex(&codec::encode_cursor(path, &full_cursor()).unwrap()), CURSOR);
    assert_eq!(codec::decode_cursor(&bytes(CURSOR)).unwrap(), (path.to_owned(), full_cursor()));
}

#[test]
fn every_changed_byte_is_noticed() {
    let record = bytes(EVENT);
    for at in 0..record.len() {
        let mut changed = record.clone();
        changed[at] ^= 0x10;
        assert!(codec::decode_event(&changed).is_err(), "byte {at}");
    }
    for length in 0..record.len() {
        assert!(codec::decode_event(&record[..length]).is_err(), "cut to {length}");
    }
    assert!(codec::decode_event(&[record.as_slice(), b"x"].concat()).is_err());
}

#[test]
fn a_newer_version_is_told_apart_from_damage() {
    let mut newer = bytes(EVENT);
    newer[0] = 2;
    assert_eq!(codec::decode_event(&newer), Err(CodecError::Version(2)));
}

#[test]
fn a_letter_fits_into_one_piece_whatever_its_message() {
    let mut long = letter();
    long.failure.message = "é".repeat(5000);
    long.failure.sqlstate = Some("9".repeat(5000));
    let record = codec::encode_letter(&long).unwrap();
    assert!(record.len() <= piece::CONTENT_BYTES_MAX);
    assert_eq!(codec::decode_letter(&record).unwrap().failure.message, "é".repeat(1024));
}

#[test]
fn pieces_are_written_as_they_always_were() {
    let mut builder = BlockBuilder::default();
    builder.add(&Totals { sequence: 4, events: 3, bytes: 300 }, 9000, b"abc");
    builder.add(&Totals { sequence: 5, events: 4, bytes: 9300 }, 0, b"");
    assert_eq!(hex(&builder.take(7).1), BLOCK);
    assert_eq!(hex(&Piece { kind: piece::CHUNK, sequence: 5, index: 1, start: 7, content: b"def" }.encode()), CHUNK);
    let acknowledged = Totals { sequence: 6, events: 4, bytes: 9300 };
    let settled = Totals { sequence: 5, events: 3, bytes: 300 };
    assert_eq!(hex(&Marks { start: 7, acknowledged, settled }.encode().1), MARK);
}

#[test]
fn every_kind_of_value_survives() {
    for origin in [Origin::Hook, Origin::Http, Origin::Cli] {
        for refs in [
            ForeignKeys::default(),
            ForeignKeys { project_id: Some(i32::MIN), agent_id: Some(0), command_id: Some(i32::MAX), turn_id: None },
        ] {
            for timestamp in [Timestamp::MIN, Timestamp::MAX, Timestamp::UNIX_EPOCH] {
                let event = Event::from_checked_parts(EventParts {
                    id: EventId::new(),
                    event_type: EventType::new(""),
                    timestamp,
                    payload: Payload::from_json("{\"é\":\"\u{1f980}\"}".into()),
                    refs,
                    origin: origin.clone(),
                });
                let record = codec::encode_event(&event, timestamp, u32::MAX).unwrap();
                assert_eq!(codec::decode_event(&record).unwrap().event, event);
            }
        }
    }
    for kind in [
        FailureKind::Unreadable,
        FailureKind::Invalid,
        FailureKind::TooLarge,
        FailureKind::Refused,
        FailureKind::Damaged,
    ] {
        for content in [Content::Event, Content::Input] {
            let failure = Failure { kind, message: String::new(), sqlstate: None };
            let letter = Letter { failed_at: captured_at(), failure, content, attempts: 0 };
            assert_eq!(codec::decode_letter(&codec::encode_letter(&letter).unwrap()).unwrap(), letter);
        }
    }
}
