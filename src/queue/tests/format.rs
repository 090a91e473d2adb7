//! What stands in a segment, byte for byte. A test that fails here is not to be adapted: the bytes are on people's disks.

use super::*;
use crate::queue::codec::{self, CodecError, Letters, Marks, Totals};
use crate::queue::piece::{Block, Piece};

const EVENT: &str = "01abd4c1c70100b49376e2fa180000000000000000020000004022a59619de5b93a9d0467b28aea5943fcd853dfe9c971700000000000000000d000000000000007475726e5f64657465637465640107000000000001ffffffff0000000015000000000000002f686f6d652f736f6d656f6e652f612e6a736f6e6c2a000000000000001a000000000000007b226e756d626572223a34322c2274657874223a22787878227d";
const INPUT: &str = "01d10a34ea0100b49376e2fa180000000000000000000e000000000000006e6f204a534f4e206f626a65637400010000000101000000000000007402000000036afc9198254f86bd5d443521c9e72102000000000000000395";
const REFUSED: &str = "01809b90750100b49376e2fa1800000000000000000305000000000000006e6f20c3a901050000000000000032325030350000000004000000a50000000000000001abd4c1c70100b49376e2fa180000000000000000020000004022a59619de5b93a9d0467b28aea5943fcd853dfe9c971700000000000000000d000000000000007475726e5f64657465637465640107000000000001ffffffff0000000015000000000000002f686f6d652f736f6d656f6e652f612e6a736f6e6c2a000000000000001a000000000000007b226e756d626572223a34322c2274657874223a22787878227d";
const CURSOR: &str = "01890e7efc05000000000000002f742fc3a90100000000000000020000000000000007000000000000006300000000000000010d000000000000002f686f6d652f736f6d656f6e65010500000000000000000000000000000001faffffffffffffffffffffffffffffff000107000000";

/// A block of an event, whose record goes on elsewhere, and a rejection.
const BLOCK: &str = "68777132650000000000000005000000000000000000000007000eee4fb8ad03fb2c0102fb2823036162630000";
const CHUNK: &str = "6877713278000000000000000500000001000000000000000700035a8f8d6f646566";
const SESSION_END: &str = "010a38ee02000000000000000000000000000000420100b49376e2fa180000000000000000";
const MARK: &str = "687771326d0000000000000000000000000000000000000007000d7e3815240604fb54240503fb2c01024603";

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn captured_at() -> Timestamp {
    Timestamp::from_nanosecond(1_800_000_000_000_000_001).unwrap()
}

fn failure(kind: FailureKind) -> Failure {
    Failure { kind, message: "no é".into(), sqlstate: Some("22P05".into()) }
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
    let stored = codec::decode_event(7, &bytes(EVENT)).unwrap();
    assert_eq!(
        stored,
        Envelope { sequence: sequence(7), event: event.clone(), captured_at: captured_at(), attempts: 2 }
    );

    let failure = failure(FailureKind::Refused);
    let refused = codec::encode_refused(&failure, captured_at(), 4, &bytes(EVENT)).unwrap();
    assert_eq!(hex(&refused), REFUSED);
    let content = DeadContent::Event { event, captured_at: captured_at(), attempts: 4 };
    let letter = DeadLetter { sequence: sequence(7), failed_at: captured_at(), failure, content };
    assert_eq!(codec::decode_letter(sequence(7), &refused).unwrap(), letter);

    let rejection = Rejection { event_type: Some(EventType::new("t")), origin: Origin::Http, ..rejection(b"\0\xff") };
    let letter =
        DeadLetter { failure: rejection.failure.clone(), content: DeadContent::Input(rejection.clone()), ..letter };
    assert_eq!(codec::decode_letter(sequence(7), &bytes(INPUT)).unwrap(), letter);
    // Masked, differently each time.
    let [one, other] = [0, 1].map(|_| codec::encode_rejection(&rejection, captured_at()).unwrap());
    assert_ne!(one, other);
    assert_eq!(codec::decode_letter(sequence(7), &one).unwrap(), letter);

    let path = Path::new("/t/é");
    assert_eq!(hex(&codec::encode_cursor(path, &full_cursor()).unwrap()), CURSOR);
    assert_eq!(codec::decode_cursor(&bytes(CURSOR)).unwrap(), (path.to_owned(), full_cursor()));

    let session = Uuid::from_u128(0x42);
    assert_eq!(hex(&codec::encode_session_end(session, captured_at()).unwrap()), SESSION_END);
    assert_eq!(codec::decode_session_end(&bytes(SESSION_END)).unwrap(), (session, captured_at()));
}

#[test]
fn every_changed_byte_is_noticed() {
    let record = bytes(EVENT);
    for at in 0..record.len() {
        let mut changed = record.clone();
        changed[at] ^= 0x10;
        assert!(codec::decode_event(7, &changed).is_err(), "byte {at}");
    }
    for length in 0..record.len() {
        assert!(codec::decode_event(7, &record[..length]).is_err(), "cut to {length}");
    }
    assert!(codec::decode_event(7, &[record.as_slice(), b"x"].concat()).is_err());
}

#[test]
fn a_newer_version_is_told_apart_from_damage() {
    let mut newer = bytes(EVENT);
    newer[0] = 2;
    assert_eq!(codec::decode_event(7, &newer), Err(CodecError::Version(2)));
}

#[test]
fn a_long_message_is_cut() {
    let long = Failure { message: "é".repeat(5000), ..failure(FailureKind::Refused) };
    let record = codec::encode_refused(&long, captured_at(), 1, &bytes(EVENT)).unwrap();
    assert_eq!(codec::decode_letter(sequence(1), &record).unwrap().failure.message, "é".repeat(1024));
}

#[test]
fn pieces_are_written_as_they_always_were() {
    let mut builder = Block::default();
    builder.add(&Totals { sequence: 4, events: 3, bytes: 300 }, 9000, b"abc");
    builder.add(&Totals { sequence: 5, events: 4, bytes: 9300 }, 0, b"");
    assert_eq!(hex(&builder.take(7).1), BLOCK);
    let chunk = Piece { kind: piece::CHUNK, number: 5, index: 1, batch: 7, content: b"def".to_vec() };
    assert_eq!(hex(&chunk.encode().1), CHUNK);
    let acknowledged = Totals { sequence: 6, events: 4, bytes: 9300 };
    let settled = Totals { sequence: 5, events: 3, bytes: 300 };
    assert_eq!(
        hex(&piece::mark(&Marks { acknowledged, settled, letters: Letters { count: 2, bytes: 70 } }, 7, 3).1),
        MARK
    );
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
                assert_eq!(codec::decode_event(7, &record).unwrap().event, event);
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
        let record = codec::encode_refused(&failure(kind), captured_at(), 0, &bytes(EVENT)).unwrap();
        assert_eq!(codec::decode_letter(sequence(1), &record).unwrap().failure, failure(kind));
    }
}
