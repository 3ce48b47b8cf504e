//! Compares words and counts with those of bpe-openai.

use std::path::Path;

use fastrand::Rng;

/// Fails unless `text` has the same words as with bpe-openai, and each the same count.
#[track_caller]
fn compare(text: &str) {
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

#[test]
fn every_token_is_one() {
    let bpe = &bpe_openai::o200k_base().bpe;
    for rank in 0..bpe.num_tokens() as u32 {
        let token = bpe.token_bytes(rank);
        assert!(token.len() <= o200k::table::LONGEST);
        assert_eq!(o200k::table::rank(token), Some(rank));
        // Merging leads to it as well.
        if let Ok(token) = std::str::from_utf8(token) {
            assert_eq!(bpe.count(token.as_bytes()), 1);
            assert_eq!(o200k::merge::count_word(token), 1);
        }
    }
}

#[test]
fn every_character_splits_alike_next_to_others() {
    // Beyond the assigned ones few will do.
    let assigned = '\0'..'\u{32000}';
    let tags = '\u{e0000}'..'\u{e0200}';
    let more = ('\u{32000}'..=char::MAX).step_by(251);
    let mut text = String::new();
    for character in assigned.chain(tags).chain(more) {
        for other in ["a", "A", "1", " ", "\u{301}", "ª", "."] {
            text.push(character);
            text.push_str(other);
        }
        if text.len() > 1 << 16 {
            compare(&text);
            text.clear();
        }
    }
    compare(&text);
}

#[test]
fn files_count_alike() {
    let worker = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = 0;
    for folder in [
        "tests/it/parity",
        "tests/it",
        "src/digest",
        "o200k/src",
        ".",
    ] {
        for entry in std::fs::read_dir(worker.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                compare(&String::from_utf8_lossy(&std::fs::read(path).unwrap()));
                files += 1;
            }
        }
    }
    assert!(files > 50, "{files}");
}

/// What random texts are made of, a kind a line.
fn kinds() -> Vec<Vec<String>> {
    let pieces = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>();
    let tokens = |range: std::ops::Range<u32>| {
        let bpe = &bpe_openai::o200k_base().bpe;
        let tokens = range.map(|rank| bpe.token_bytes(rank).to_vec());
        tokens.filter_map(|t| String::from_utf8(t).ok()).collect()
    };
    let characters = |range: std::ops::RangeInclusive<char>| range.map(String::from).collect();
    vec![
        characters(' '..='~'),
        characters('a'..='d'),
        characters('A'..='z'),
        characters('\0'..='\u{17f}'),
        characters('\u{2b0}'..='\u{36f}'),
        characters('\u{400}'..='\u{5ff}'),
        characters('\u{900}'..='\u{dff}'),
        characters('\u{1e00}'..='\u{218f}'),
        characters('\u{3000}'..='\u{30ff}'),
        characters('\u{4e00}'..='\u{4fff}'),
        characters('\u{1f300}'..='\u{1f9ff}'),
        characters('\0'..=char::MAX),
        pieces(" |  |\t|\n|\r\n|\r|\u{a0}|\u{85}|\u{2028}|\u{3000}|\u{b}|a|.|/"),
        pieces("'|s|S|ſ|t|re|RE|vE|m|ll|lL|d|D|a|A|ª|\u{301}|’| |1|''"),
        pieces("a|B|ǅ|ʰ|日|\u{301}|\u{903}|1| |.|\n"),
        pieces("0|1|23|٣|Ⅷ|½|一|²| |,|a"),
        pieces("/|//|\n|\r|.|=|-|====| |\t|_|{|}|</|>|a"),
        pieces("    |\t|fn|(|)|;|\n|self|.|&mut|->|::|_x|0x1F|\"|#|//|Größe|日本|😀|👨‍👩‍👧"),
        tokens(0..2_000),
        tokens(2_000..50_000),
        tokens(50_000..199_998),
    ]
}

#[test]
fn random_texts_count_alike() {
    let mut random = Rng::with_seed(7);
    let kinds = kinds();
    for _ in 0..10_000 {
        let kind = random.choice(&kinds).unwrap();
        let other = random.choice(&kinds).unwrap();
        let is_mixed = random.bool();
        let mut text = String::new();
        for _ in 0..random.usize(..120) {
            let kind = if is_mixed && random.u8(..4) == 0 {
                other
            } else {
                kind
            };
            text.push_str(random.choice(kind).unwrap());
        }
        compare(&text);
    }
}

/// Long words are merged in another way than short ones.
#[test]
fn random_words_of_any_length_count_alike() {
    let mut random = Rng::with_seed(8);
    let kinds = kinds();
    for _ in 0..4_000 {
        let kind = random.choice(&kinds).unwrap();
        let few: Vec<_> = (0..random.usize(1..6))
            .map(|_| random.choice(kind).unwrap().as_str())
            .collect();
        let length = random.usize(1..300);
        let word: String = (0..length).map(|_| *random.choice(&few).unwrap()).collect();
        let expected = bpe_openai::o200k_base().bpe.count(word.as_bytes());
        assert_eq!(o200k::merge::count_word(&word), expected as u64, "{word:?}");
    }
}

/// Merging or splitting that takes time square to the length would not end.
#[test]
fn a_megabyte_of_the_same_counts_alike() {
    for piece in ["a", "A", " ", "\n", "1", "=", "\u{301}", "日"] {
        compare(&piece.repeat((1 << 20) / piece.len()));
    }
}

#[test]
fn long_texts_of_few_characters_count_alike() {
    for piece in [
        "z",
        "\t",
        "\r\n",
        " \n",
        "\n ",
        "/",
        "\0",
        "क",
        "😀",
        "ſ",
        "'s",
        "ab",
        "aB",
        "Ab",
        "aaB",
        "ʰ",
        "A\u{301}",
        "\u{301}A",
        "日A",
        " a",
        "  a",
        "\u{a0}",
        "a\u{301}",
        "abcdefghij",
        "\u{200d}",
        "-=",
        "👨\u{200d}👩\u{200d}👧",
        "xX_",
        "\u{1f1e9}",
        "\u{ffff}",
    ] {
        compare(&piece.repeat((1 << 17) / piece.len()));
    }
    let mut random = Rng::with_seed(9);
    for letters in [
        "ab",
        "abcdefghijklmnopqrstuvwxyz",
        "ACGT",
        "0123456789abcdef",
        "日本語中文字",
    ] {
        let letters: Vec<char> = letters.chars().collect();
        let text: String = (0..1 << 16)
            .map(|_| *random.choice(&letters).unwrap())
            .collect();
        compare(&text);
    }
}
