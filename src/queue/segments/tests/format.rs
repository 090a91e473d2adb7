//! What stands in a segment, byte for byte. A test that fails here is not to be adapted: the bytes are on people's disks.

use super::*;
use crate::queue::segments::piece::{BlockBuilder, Piece, Totals};

/// A block of an event, whose record goes on elsewhere, and a rejection.
const BLOCK: &str = "687771316500000000000000050000000000000000000000070021e6ac18aa0000000000000003000000000000012c0002000023280003000000000000616263";
const CHUNK: &str = "687771317800000000000000050000000100000000000000070003e91ba0ac646566";
const MARK: &str = "687771316d0000000000000006000000000000000000000007001035ddf79600000000000000040000000000002454";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn pieces_are_written_as_they_always_were() {
    let mut builder = BlockBuilder::default();
    builder.add(&Totals { sequence: 4, events: 3, bytes: 300 }, 9000, b"abc");
    builder.add(&Totals { sequence: 5, events: 4, bytes: 9300 }, 0, b"");
    assert_eq!(hex(&builder.take(7).1), BLOCK);
    assert_eq!(hex(&Piece { kind: piece::CHUNK, sequence: 5, index: 1, opened: 7, content: b"def" }.encode()), CHUNK);
    assert_eq!(hex(&Totals { sequence: 6, events: 4, bytes: 9300 }.encode(piece::ACKNOWLEDGED, 7)), MARK);
}
