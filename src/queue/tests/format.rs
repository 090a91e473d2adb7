//! What earlier versions have written stays readable, byte for byte.
//!
//! The bytes below are on people's disks. A test that fails here is not to be adapted: the codec is.

use super::*;
use crate::queue::codec::{CodecError, Content, Counters, Letter};

const EVENT: &str = "0101a000000007b66ca20100b49376e2fa180000000000000000020000004022a59619de5b93a9d0467b28aea5943fcd853dfe9c971700000000000000000d000000000000007475726e5f64657465637465640107000000000001ffffffff0000000015000000000000002f686f6d652f736f6d656f6e652f612e6a736f6e6c2a000000000000001a000000000000007b226e756d626572223a34322c2274657874223a22787878227d";
const INPUT: &str = "010218000000ec9d74b20101000000000000007402000000020000000000000000ff";
const LETTER: &str = "010337000000112d749a0100b49376e2fa18000000000000000004000000010000000300000005000000000000006e6f20c3a90105000000000000003232503035";
const CURSOR: &str = "010443000000f0565ca705000000000000002f742fc3a90100000000000000020000000000000007000000000000006300000000000000010d000000000000002f686f6d652f736f6d656f6e65";
const CURSOR_2: &str = "020447000000334a764f05000000000000002f742fc3a90100000000000000020000000000000007000000000000006300000000000000010d000000000000002f686f6d652f736f6d656f6e6500000000";
const COUNTERS: &str =
    "01052800000016ee0145090000000000000005000000000000005c1100000000000003000000000000004d00000000000000";
const COUNTERS_2: &str = "0205310000001df6ae5c090000000000000005000000000000005c1100000000000003000000000000004d00000000000000010403020100000000";
const BLOCK: &str = "0102000000000000000300030000000000000005000161626364";

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

#[test]
fn version_1_is_written_and_read_as_it_always_was() {
    let event = event(42, 3);
    assert_eq!(hex(&codec::encode_event(&event, captured_at(), 2).unwrap()), EVENT);
    let stored = codec::decode_event(&bytes(EVENT)).unwrap();
    assert_eq!(stored, codec::StoredEvent { event, captured_at: captured_at(), attempts: 2 });
    assert_eq!(codec::captured_at(&bytes(EVENT)).unwrap(), captured_at());
    assert_eq!(codec::record_bytes(&bytes(EVENT)).unwrap(), EVENT.len() / 2);

    let rejection = Rejection { event_type: Some(EventType::new("t")), origin: Origin::Http, ..rejection(b"\0\xff") };
    assert_eq!(hex(&codec::encode_input(&rejection, &rejection.bytes).unwrap()), INPUT);
    assert_eq!(codec::decode_input(&bytes(INPUT), rejection.failure.clone()).unwrap(), rejection);

    assert_eq!(hex(&codec::encode_letter(&letter()).unwrap()), LETTER);
    assert_eq!(codec::decode_letter(&bytes(LETTER)).unwrap(), letter());

    let path = Path::new("/t/é");
    assert_eq!(codec::decode_cursor(&bytes(CURSOR)).unwrap(), (path.to_owned(), cursor(7)));
    assert_eq!(hex(&codec::encode_cursor(path, &cursor(7)).unwrap()), CURSOR_2);
    assert_eq!(codec::decode_cursor(&bytes(CURSOR_2)).unwrap(), (path.to_owned(), cursor(7)));

    let counters = Counters {
        next_sequence: 9,
        pending: 5,
        pending_bytes: 4444,
        dead_letters: 3,
        dead_letter_bytes: 77,
        pending_checksum: Some(0x0102_0304),
    };
    let without = Counters { pending_checksum: None, ..counters };
    assert_eq!(codec::decode_counters(&bytes(COUNTERS)).unwrap(), without);
    assert_eq!(hex(&codec::encode_counters(&counters).unwrap()), COUNTERS_2);
    assert_eq!(codec::decode_counters(&bytes(COUNTERS_2)).unwrap(), counters);
    let mut one = Counters::new(9);
    one.add_event(sequence(8), 1);
    assert_eq!(one.pending_checksum, Some(11_671_990_019_772_833_022), "the hash is on disk, too");

    let mut block = block::Block::default();
    block.add(sequence(3), b"abc".to_vec());
    block.add(sequence(5), b"d".to_vec());
    assert_eq!(hex(&block.encode()), BLOCK);
    assert_eq!(block::Block::decode(&bytes(BLOCK)).unwrap(), block);
    assert_eq!(block.bytes(), BLOCK.len() / 2);
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
    let block = bytes(BLOCK);
    for length in 0..block.len() {
        assert!(block::entries(&block[..length]).is_err(), "cut to {length}");
    }
}

#[test]
fn a_newer_version_and_another_kind_are_told_apart_from_damage() {
    let mut newer = bytes(EVENT);
    newer[0] = 2;
    assert_eq!(codec::decode_event(&newer), Err(CodecError::TooNew { found: 2, supported: 1 }));
    assert_eq!(codec::decode_event(&bytes(COUNTERS)), Err(CodecError::Kind { found: 5, expected: 1 }));
    let mut newer = bytes(BLOCK);
    newer[0] = 2;
    assert_eq!(block::entries(&newer), Err(CodecError::TooNew { found: 2, supported: 1 }));
}

#[test]
fn a_length_beyond_reason_allocates_nothing() {
    let mut record = bytes(EVENT);
    record[2..6].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(codec::record_bytes(&record), Err(CodecError::TooLarge(_))));
    assert!(codec::decode_event(&record).is_err());
}

#[test]
fn a_letter_fits_into_one_chunk_whatever_its_message() {
    let mut long = letter();
    long.failure.message = "é".repeat(5000);
    long.failure.sqlstate = Some("9".repeat(5000));
    let record = codec::encode_letter(&long).unwrap();
    assert!(record.len() <= store::CHUNK_BYTES);
    assert_eq!(codec::decode_letter(&record).unwrap().failure.message, "é".repeat(1024));
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
        for content in [Content::Event, Content::Input, Content::Raw] {
            let failure = Failure { kind, message: String::new(), sqlstate: None };
            let letter = Letter { failed_at: captured_at(), failure, content, attempts: 0 };
            assert_eq!(codec::decode_letter(&codec::encode_letter(&letter).unwrap()).unwrap(), letter);
        }
    }
}
