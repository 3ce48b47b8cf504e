//! What the tests and the fuzzer expect of a text.

/// Fails unless `text` has the same words as with bpe-openai, and each the same count.
#[track_caller]
pub(crate) fn compare(text: &str) {
    let reference = bpe_openai::o200k_base();
    let mut words = o200k::split::words(text);
    for expected in reference.split(text) {
        let word = words.next();
        assert_eq!(word, Some(expected), "a word of {:?}", start(text));
        let expected_count = reference.bpe.count(expected.as_bytes()) as u64;
        let count = o200k::merge::count_word(expected);
        assert_eq!(count, expected_count, "the tokens of {:?}", start(expected));
    }
    assert_eq!(words.next(), None, "a word too many of {:?}", start(text));
}

fn start(text: &str) -> &str {
    &text[..text.floor_char_boundary(500)]
}
