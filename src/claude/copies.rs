//! Which of several transcripts that hold the same lines is the one in which they were said.
//!
//! Claude Code copies a session's file when it is resumed, forked, or continued in the background or in the desktop app:
//! the lines keep their uuids, and from then on stand in two files. A turn is known by its uuid, so what is read first
//! counts. [`reading_order`] puts originals before their copies, by a look at head and tail of each file ([`Look`]).
//!
//! Files with the same first uuid of the conversation are one family. Which of two is the copy, the first that applies:
//!
//! 1. The line says so itself: `forkedFrom`, or another session than the file's. No order is needed for that.
//! 2. A `continued-in` line of one names the other: that is the copy.
//! 3. Only one has a line that a background process wrote (`sessionKind` is `bg`): that is the copy.
//! 4. Only one begins with state that was stamped long after the first words: that is the copy.
//! 5. Both begin with state that has a time: the one begun later is the copy.
//! 6. The file system knows when both were made: the later is the copy.
//! 7. One was read before the other appeared: the other is the copy.
//! 8. The longer is the copy: it has more of the common beginning. Else the larger name.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use uuid::Uuid;

use super::fields::{Fields, Mender};
use super::line::{LineType, MendedLine, is_envelope};
use crate::session::is_copied_by;

/// Lines that are looked at behind the first one of the conversation.
const HEAD_LINES_MAX: usize = 50;

/// What head and tail of a transcript tell of its descent.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Look {
    /// The session, by the name of the file.
    pub stem: Uuid,
    /// Uuid of the first line of the conversation.
    pub root: Option<String>,
    /// When that was said.
    pub said_at: Option<Timestamp>,
    /// The first stamped state before it.
    pub opened_at: Option<Timestamp>,
    /// First of the conversation in this session.
    pub own_at: Option<Timestamp>,
    /// A line says that it was copied, or that state was stamped long after what follows it.
    pub is_marked: bool,
    /// A background process wrote in it.
    pub is_background: bool,
    /// Sessions in which it went on.
    pub continued_in: Vec<Uuid>,
    /// When the file was made, where the file system knows.
    pub born: Option<Timestamp>,
    /// It was read before.
    pub is_known: bool,
    pub bytes: u64,
}

/// Where a transcript comes in the order of reading.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Place {
    // Compared in this order.
    pub is_copy: bool,
    /// When it began, and for a family when the first of it did. Files that tell no time come first among their like.
    pub began_at: Option<Timestamp>,
    /// In its family.
    number: usize,
}

impl Look {
    /// `head`: the first bytes of the file. `tail`: its last bytes, where the head is not all of it. Lines that are cut at
    /// their edges are passed over.
    pub(crate) fn at(stem: Uuid, head: &[u8], tail: &[u8]) -> Look {
        let mut look = Look { stem, ..Look::default() };
        let mut is_said = false; // a line of the conversation was there
        let whole = |bytes: &'_ [u8]| bytes.ends_with(b"\n");
        let mut behind = 0;
        for line in head.split_inclusive(|byte| *byte == b'\n').filter(|line| whole(line)) {
            look.take(line, Some(&mut is_said));
            behind += usize::from(is_said);
            if behind > HEAD_LINES_MAX {
                break;
            }
        }
        let tail = memchr::memchr(b'\n', tail).and_then(|newline| tail.get(newline + 1..)).unwrap_or_default();
        for line in tail.split_inclusive(|byte| *byte == b'\n').filter(|line| whole(line)) {
            look.take(line, None);
        }
        look.is_marked |= look.opened_at.zip(look.said_at).is_some_and(|(opened, said)| is_copied_by(opened, said));
        look
    }

    /// Takes in a line; `is_said` where it is one of the head.
    fn take(&mut self, line: &[u8], is_said: Option<&mut bool>) {
        let Ok(mended) = MendedLine::new(line.strip_suffix(b"\n").unwrap_or(line)) else { return };
        let Ok(fields) = Fields::of(&mended.text) else { return };
        let mut mender = Mender { is_mended: false };
        self.is_background |= mender.string(fields.get("sessionKind")).is_some_and(|kind| kind == "bg");
        if mender.string(fields.get("type")).is_some_and(|name| name == "continued-in") {
            self.continued_in.extend(
                mender.string(fields.get("continuedInSessionId")).and_then(|session| session.parse::<Uuid>().ok()),
            );
        }
        let Some(is_said) = is_said else { return };
        let at = mender.string(fields.get("timestamp")).and_then(|text| text.parse::<Timestamp>().ok());
        let Some(said) = Said::of(&fields, &mut mender) else {
            if !*is_said {
                self.opened_at = self.opened_at.or(at);
            }
            return;
        };
        let is_foreign = said.session.is_some_and(|session| session != self.stem);
        if !std::mem::replace(is_said, true) {
            self.said_at = at;
            self.root = said.uuid;
            self.is_marked |= is_foreign;
        }
        if !is_foreign {
            self.own_at = self.own_at.or(at);
        }
        self.is_marked |= said.is_forked;
    }

    fn began_at(&self) -> Option<Timestamp> {
        if self.is_marked { self.opened_at.or(self.own_at).or(self.said_at) } else { self.said_at.or(self.opened_at) }
    }
}

/// Files with which a copy is compared, at most: of more than so many forks of one session the first and the latest.
pub(crate) const ANCESTORS_MAX: usize = 8;

/// How a transcript is to be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Reading {
    pub place: Place,
    /// The files of other sessions that it may have been copied from, at most [`ANCESTORS_MAX`]; indexes.
    pub ancestors: Vec<usize>,
}

/// How each of these files is to be read: originals by when they began, then copies, each behind what it was copied from.
pub(crate) fn reading_order(looks: &[Look]) -> Vec<Reading> {
    let depths = depths(looks);
    let mut families: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, look) in looks.iter().enumerate() {
        if let Some(root) = &look.root {
            families.entry(root).or_default().push(index);
        }
    }
    let mut readings: Vec<Reading> = looks
        .iter()
        .map(|look| Place { is_copy: look.is_marked || look.is_background, began_at: look.began_at(), number: 0 })
        .map(|place| Reading { place, ancestors: Vec::new() })
        .collect();
    for family in families.values().filter(|family| family.len() > 1) {
        let first_at = family.iter().filter_map(|index| looks.get(*index)?.said_at).min();
        let member = |index: &usize| Some((looks.get(*index)?, *depths.get(*index)?));
        for index in family {
            let (Some(this), Some(reading)) = (member(index), readings.get_mut(*index)) else { continue };
            let is_before = |other: &&usize| member(other).is_some_and(|other| descent(other, this).is_lt());
            let number = family.iter().filter(is_before).count();
            reading.place = Place { is_copy: number > 0 || this.0.is_marked, began_at: first_at, number };
        }
        let mut in_order = family.clone();
        in_order.sort_by_key(|index| readings.get(*index).map(|reading| reading.place));
        for (position, index) in in_order.iter().enumerate() {
            let is_other =
                |other: &&usize| looks.get(**other).map(|look| look.stem) != looks.get(*index).map(|look| look.stem);
            let before: Vec<usize> = in_order.iter().take(position).filter(is_other).copied().collect();
            let latest = before.len().saturating_sub(ANCESTORS_MAX - 1).max(1);
            let kept = before.iter().take(1).chain(before.iter().skip(latest)).copied();
            if let Some(reading) = readings.get_mut(*index) {
                reading.ancestors = kept.collect();
            }
        }
    }
    readings
}

/// `Less`: `a` is the ancestor. Not always transitive.
fn descent((a, depth_a): (&Look, u32), (b, depth_b): (&Look, u32)) -> Ordering {
    let both = |a: Option<Timestamp>, b: Option<Timestamp>| a.zip(b).map_or(Ordering::Equal, |(a, b)| a.cmp(&b));
    depth_a
        .cmp(&depth_b)
        .then_with(|| a.is_background.cmp(&b.is_background))
        .then_with(|| a.is_marked.cmp(&b.is_marked))
        .then_with(|| both(a.opened_at, b.opened_at))
        .then_with(|| both(a.born, b.born))
        // What was there before is no copy of what has just come.
        .then_with(|| b.is_known.cmp(&a.is_known))
        .then_with(|| a.bytes.cmp(&b.bytes))
        .then_with(|| a.stem.cmp(&b.stem))
}

/// A line of the conversation, as far as its descent is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Said {
    /// The same in every copy.
    pub uuid: Option<String>,
    /// The session that the line names.
    session: Option<Uuid>,
    is_forked: bool,
}

impl Said {
    /// Reads a line, given without its newline. `None`: it is none of the conversation, or is damaged.
    pub(crate) fn read(line: &[u8]) -> Option<Said> {
        let mended = MendedLine::new(line).ok()?;
        let fields = Fields::of(&mended.text).ok()?;
        Said::of(&fields, &mut Mender { is_mended: false })
    }

    fn of(fields: &Fields<'_>, mender: &mut Mender) -> Option<Said> {
        let line_type = mender.string(fields.get("type")).map_or(LineType::Unknown, |name| LineType::named(&name));
        is_envelope(fields, line_type).then(|| Said {
            uuid: mender.filled_string(fields.get("uuid")),
            session: mender.string(fields.get("sessionId")).and_then(|text| text.parse().ok()),
            is_forked: fields.get("forkedFrom").is_some(),
        })
    }

    /// Whether it says itself that it was said in another session than that of its file.
    pub(crate) fn is_of_another(&self, session: Uuid) -> bool {
        self.is_forked || self.session.is_some_and(|named| named != session)
    }
}

/// The uuid of the first line of the conversation, which is the same in all of a family.
pub(crate) fn root(head: &[u8]) -> Option<String> {
    let lines = head.split_inclusive(|byte| *byte == b'\n');
    lines.filter_map(|line| line.strip_suffix(b"\n")).find_map(Said::read)?.uuid
}

/// How many `continued-in` lines lead to each file.
fn depths(looks: &[Look]) -> Vec<u32> {
    /// No session goes on so often, and a circle has no end.
    const DEPTH_MAX: u32 = 100;
    let mut depths = vec![0; looks.len()];
    let mut level: HashSet<Uuid> = looks.iter().flat_map(|look| &look.continued_in).copied().collect();
    for depth in 1..=DEPTH_MAX {
        if level.is_empty() {
            break;
        }
        let reached = looks.iter().zip(&mut depths).filter(|(look, _)| level.contains(&look.stem));
        let next = reached.flat_map(|(look, reached)| {
            *reached = depth;
            &look.continued_in
        });
        level = next.copied().collect();
    }
    depths
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const SESSION: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    fn said(time: &str) -> Value {
        json!({"type": "user", "uuid": "r", "sessionId": SESSION, "timestamp": time, "message": {"content": "a"}})
    }

    fn state(time: &str) -> Value {
        json!({"type": "queue-operation", "timestamp": time})
    }

    fn with(mut line: Value, name: &str, value: Value) -> Value {
        line[name] = value;
        line
    }

    fn text(lines: &[Value]) -> String {
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Of a file alone: whether it is a copy, and when it began.
    fn alone(lines: &[Value]) -> (bool, Option<Timestamp>) {
        let place = reading_order(&[Look::at(SESSION, text(lines).as_bytes(), b"")])[0].place;
        (place.is_copy, place.began_at)
    }

    fn time(text: &str) -> Option<Timestamp> {
        Some(text.parse().unwrap())
    }

    const TEN: &str = "2026-01-01T10:00:00Z";
    const NOON: &str = "2026-01-01T12:00:00Z";

    #[test]
    fn an_original_begins_with_its_first_words() {
        assert_eq!(alone(&[state("2026-01-01T10:00:01Z"), said(TEN)]), (false, time(TEN)));
        assert_eq!(alone(&[said(TEN), state(NOON)]), (false, time(TEN)), "state written later tells nothing");
    }

    #[test]
    fn a_copy_gives_itself_away() {
        let title = json!({"type": "custom-title", "customTitle": "t"});
        assert_eq!(alone(&[title, state(NOON), said(TEN)]), (true, time(NOON)));
        let new = json!({"type": "new-state"});
        assert_eq!(alone(&[new, state(NOON), said(TEN)]), (true, time(NOON)));
        let foreign = with(said(TEN), "sessionId", json!(OTHER));
        assert_eq!(alone(&[json!({"type": "summary"}), foreign, said(NOON)]), (true, time(NOON)));
        let forked = with(said(TEN), "forkedFrom", json!({"sessionId": OTHER, "messageUuid": "m"}));
        assert!(alone(&[forked]).0);
        assert!(alone(&[with(said(TEN), "sessionKind", json!("bg"))]).0, "it may be one, and waits for others");
    }

    #[test]
    fn originals_come_before_copies_and_each_by_age() {
        let place = |is_copy, began_at: Option<&str>| Place { is_copy, began_at: began_at.and_then(time), number: 0 };
        let sorted = [
            place(false, None),
            place(false, Some(TEN)),
            place(false, Some(NOON)),
            place(true, None),
            place(true, Some(TEN)),
            place(true, Some(NOON)),
        ];
        assert!(sorted.is_sorted());
    }

    #[test]
    fn damage_and_cut_lines_are_passed_over() {
        let nothing = Look::at(SESSION, b"", b"");
        assert_eq!(Look::at(SESSION, b"garbage\n\n\0\n[]\n{\"type\":", b""), nothing);
        assert_eq!(Look::at(SESSION, said(TEN).to_string().as_bytes(), b""), nothing);
        // The first line of a tail is cut, and may look whole.
        let tail = format!("{}\n{{\"type\":\"mode\"}}\n", json!({"type": "mode", "sessionKind": "bg"}));
        assert_eq!(Look::at(SESSION, b"", tail.as_bytes()), nothing);
    }

    /// The stems of files in the order of reading, whatever the order in which they are found.
    fn order(looks: &[Look]) -> Vec<u128> {
        let read = |looks: &[Look]| {
            let places = reading_order(looks).into_iter().map(|reading| reading.place);
            let mut files: Vec<_> = places.zip(looks.iter().map(|look| look.stem)).collect();
            files.sort();
            files.into_iter().map(|(_, stem)| stem.as_u128()).collect::<Vec<_>>()
        };
        let order = read(looks);
        let backwards: Vec<Look> = looks.iter().rev().cloned().collect();
        assert_eq!(read(&backwards), order);
        order
    }

    /// A file of the family that begins at ten.
    fn member(stem: u128, tail: &[Value]) -> Look {
        let tail = format!("cut\n{}", text(tail));
        Look::at(
            Uuid::from_u128(stem),
            text(&[with(said(TEN), "sessionId", json!(Uuid::from_u128(stem)))]).as_bytes(),
            tail.as_bytes(),
        )
    }

    fn continued_in(stem: u128) -> Value {
        json!({"type": "continued-in", "timestamp": NOON, "continuedInSessionId": Uuid::from_u128(stem)})
    }

    #[test]
    fn what_goes_on_elsewhere_comes_before_where_it_goes_on() {
        assert_eq!(order(&[member(1, &[]), member(2, &[continued_in(1)])]), [2, 1]);
        let chain =
            [member(1, &[continued_in(2)]), member(2, &[]), member(3, &[continued_in(1), json!({"type": "mode"})])];
        assert_eq!(order(&chain), [3, 1, 2]);
        // It outweighs the background's mark.
        let background = with(said(NOON), "sessionKind", json!("bg"));
        assert_eq!(order(&[member(1, &[background, continued_in(2)]), member(2, &[])]), [1, 2]);
        // A circle ends.
        assert_eq!(reading_order(&[member(1, &[continued_in(2)]), member(2, &[continued_in(1)])]).len(), 2);
    }

    #[test]
    fn what_the_background_wrote_in_is_the_copy() {
        let background = with(said(NOON), "sessionKind", json!("bg"));
        assert_eq!(order(&[member(1, &[background]), member(2, &[])]), [2, 1]);
    }

    #[test]
    fn of_two_that_say_when_they_were_begun_the_later_is_the_copy() {
        let begun = |stem: u128, opened: &str| {
            let lines = [state(opened), with(said(TEN), "sessionId", json!(Uuid::from_u128(stem)))];
            Look::at(Uuid::from_u128(stem), text(&lines).as_bytes(), b"")
        };
        // Also within two seconds.
        assert_eq!(order(&[begun(1, "2026-01-01T10:00:02Z"), begun(2, "2026-01-01T10:00:01Z")]), [2, 1]);
        assert_eq!(order(&[begun(1, NOON), begun(2, TEN)]), [2, 1]);
    }

    #[test]
    fn state_stamped_long_after_the_first_words_outweighs_the_age_of_the_file() {
        let lines = [state(NOON), with(said(TEN), "sessionId", json!(SESSION))];
        let copy = Look { born: time(TEN), ..Look::at(SESSION, text(&lines).as_bytes(), b"") };
        assert_eq!(order(&[copy, Look { born: time(NOON), ..member(2, &[]) }]), [2, 1]);
    }

    #[test]
    fn then_the_age_of_the_file_decides_and_then_its_length() {
        let file =
            |stem: u128, born: Option<&str>, bytes: u64| Look { born: born.and_then(time), bytes, ..member(stem, &[]) };
        assert_eq!(order(&[file(1, Some(NOON), 1), file(2, Some(TEN), 2)]), [2, 1]);
        assert_eq!(order(&[file(1, None, 2), file(2, Some(TEN), 1)]), [2, 1]);
        assert_eq!(order(&[file(1, Some(TEN), 1), file(2, Some(TEN), 1)]), [1, 2]);
    }

    #[test]
    fn of_many_forks_the_first_and_the_latest_are_ancestors() {
        let file = |stem: u128| Look { bytes: stem as u64, ..member(stem, &[]) };
        let looks: Vec<Look> = (0..20).map(file).collect();
        let readings = reading_order(&looks);
        assert_eq!(readings[0].ancestors, [0; 0]);
        assert_eq!(readings[3].ancestors, [0, 1, 2]);
        assert_eq!(readings[8].ancestors, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(readings[19].ancestors, [0, 12, 13, 14, 15, 16, 17, 18]);
        // Two files of one session are no copies of each other.
        let twice = [file(1), Look { bytes: 2, ..file(1) }];
        assert!(reading_order(&twice).iter().all(|reading| reading.ancestors.is_empty()));
    }

    #[test]
    fn other_files_are_no_family() {
        let other = Look { root: Some("other".to_owned()), ..member(1, &[]) };
        assert_eq!(reading_order(&[other, member(2, &[])]).iter().filter(|reading| reading.place.is_copy).count(), 0);
        let untold = Look { root: None, ..member(1, &[]) };
        assert_eq!(reading_order(&[untold.clone(), untold]).iter().filter(|reading| reading.place.is_copy).count(), 0);
    }
}
