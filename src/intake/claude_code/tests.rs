use std::collections::BTreeMap;

use super::*;

#[test]
fn counts_over_the_corpus_are_those_of_its_table() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/transcripts");
    let Ok(table) = std::fs::read_to_string(corpus.join("EXPECTED.tsv")) else {
        eprintln!("skipped: no corpus beside the checkout");
        return;
    };
    for row in table.lines().skip(1) {
        let cells = row.split('\t').collect::<Vec<_>>();
        let kind = classify(Path::new(cells[0])).unwrap();
        let bytes = std::fs::read(corpus.join(cells[0])).unwrap();
        let mut n = [0; 3];
        let mut k = BTreeMap::new();
        for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let m = read_line(line, &kind).unwrap();
            assert!(m.unknown_type.is_none(), "{:?}", m.unknown_type);
            let Some(t) = m.turn else { continue };
            *k.entry(format!("{:?}", t.kind)).or_insert(0) += 1;
            match t.kind {
                None => n[2] += 1,
                Some(TurnKind::Queued) => n[1] += 1,
                Some(TurnKind::Prompt | TurnKind::Plan) => n[0] += 1,
                _ => {}
            }
        }
        let exp = [2, 3, 4].map(|c| cells[c].parse::<i32>().unwrap());
        if n != exp {
            println!("DIFF {} ours {n:?} expected {exp:?} {k:?}", cells[0]);
        }
    }
}
