//! A line of an ignore file, with the meaning that `pathspec` 1.1.1 ("gitwildmatch") gives it.
//!
//! It differs from git's: a class may match `/`, `.` matches no newline, and `$` matches before a newline
//! that ends the path.

/// A parsed pattern.
#[derive(Debug, PartialEq)]
pub(super) struct Pattern {
    /// `!`: includes again what it matches.
    pub(super) negated: bool,
    /// Ends in `/` or `/**`: matches everything below a path, but not the path itself.
    pub(super) below_only: bool,
    /// The directory of all that it matches: its leading segments without wildcards.
    pub(super) directory: String,
    /// The part below [`directory`](Self::directory).
    pub(super) rest: Rest,
}

/// The part of a pattern after its literal directory.
#[derive(Debug, PartialEq)]
pub(super) enum Rest {
    /// A name directly in the directory.
    Child(Segment),
    /// A name at any depth below the directory.
    Deep(Segment),
    /// Everything below the directory.
    Everything,
    /// A regular expression, without anchors, for the whole path below the directory.
    Path(String),
}

/// A pattern for one name.
pub(super) type Segment = Vec<Token>;

/// A piece of a [`Segment`].
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// This character.
    Char(char),
    /// `?`: one character that is not a slash.
    One,
    /// `*`: any number of characters that are not slashes.
    Star,
    /// `[…]`.
    Class(Class),
}

/// `[a-z]` or `[!a-z]`, as in a Python regular expression.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    /// Whether `c` is in it.
    pub(super) fn matches(&self, c: char) -> bool {
        self.ranges.iter().any(|&(low, high)| low <= c && c <= high) != self.negated
    }

    /// Parses a class from behind its `[`. Also returns the text after its `]`.
    fn parse(text: &str) -> Result<(Self, &str), Unusable> {
        let (negated, inner) = match text.strip_prefix(['!', '^']) {
            Some(inner) => (true, inner),
            None => (false, text),
        };
        // A bracket in first place stands for itself.
        let searched = inner.strip_prefix(']').unwrap_or(inner);
        let end = inner.len() - searched.len() + searched.find(']').ok_or(Unusable)?;
        let mut chars = inner[..end].chars().peekable();
        let mut ranges = Vec::new();
        while let Some(low) = chars.next() {
            let mut ahead = chars.clone();
            match (ahead.next(), ahead.next()) {
                (Some('-'), Some(high)) if high < low => return Err(Unusable),
                (Some('-'), Some(high)) => {
                    ranges.push((low, high));
                    chars = ahead;
                }
                _ => ranges.push((low, low)),
            }
        }
        Ok((Self { negated, ranges }, &inner[end + 1..]))
    }

    fn push_regex(&self, regex: &mut String) {
        regex.push_str(if self.negated { "[^" } else { "[" });
        for &(low, high) in &self.ranges {
            let (low, high) = (u32::from(low), u32::from(high));
            regex.push_str(&format!("\\x{{{low:x}}}-\\x{{{high:x}}}"));
        }
        regex.push(']');
    }
}

/// A line that matches nothing, with unbalanced brackets, or that makes gitingest fail, such as a
/// backslash at a segment's end or a class from `z` to `a`.
#[derive(Debug, PartialEq)]
pub(super) struct Unusable;

impl Pattern {
    /// Parses a pattern that begins with the directory of its ignore file, as gitingest passes it to
    /// pathspec. `Ok(None)` for comments and blank lines.
    pub(super) fn parse(text: &str) -> Result<Option<Self>, Unusable> {
        let text = if text.ends_with("\\ ") {
            text
        } else {
            text.trim_end_matches(is_python_space)
        };
        if text.is_empty() || text.starts_with('#') {
            return Ok(None);
        }
        let (negated, body) = match text.strip_prefix('!') {
            Some(body) => (true, body),
            None => (false, text),
        };
        if body.is_empty() {
            return Err(Unusable);
        }
        let (body, mut below_only) = match body.strip_suffix('/') {
            Some(body) => (body, true),
            None => (body, false),
        };
        // Only a directory named `!` leads to a slash in front.
        let (body, anchored) = match body.strip_prefix('/') {
            Some(body) => (body, true),
            None => (body, false),
        };
        let mut parts: Vec<&str> = body.split('/').collect();
        if parts.len() == 1 && !anchored {
            parts.insert(0, "**");
        }
        parts.dedup_by(|b, a| *a == "**" && *b == "**");
        if parts.len() > 1 && parts.last() == Some(&"**") {
            parts.pop();
            below_only = true;
        }
        if parts == ["**"] || parts == ["**", "*"] {
            return Ok(Some(Self {
                negated,
                below_only,
                directory: String::new(),
                rest: Rest::Everything,
            }));
        }

        let segment = |part: &&str| (*part != "**").then(|| tokens(part)).transpose();
        let segments: Vec<Option<Segment>> = parts.iter().map(segment).collect::<Result<_, _>>()?;
        let mut directory = Vec::new();
        let mut rest = segments.as_slice();
        while let [Some(first), tail @ ..] = rest
            && !tail.is_empty()
            && let Some(name) = literal(first)
        {
            directory.push(name);
            rest = tail;
        }
        let rest = match rest {
            [Some(name)] if within_a_name(name) => Rest::Child(name.clone()),
            [None, Some(name)] if within_a_name(name) => Rest::Deep(name.clone()),
            rest => Rest::Path(path_regex(rest)),
        };
        Ok(Some(Self {
            negated,
            below_only,
            directory: directory.join("/"),
            rest,
        }))
    }
}

/// Whether Python's `str.strip` removes `c`: Unicode's white space and four separators.
pub(super) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Returns the name that a segment without wildcards stands for.
pub(super) fn literal(segment: &[Token]) -> Option<String> {
    let character = |token: &Token| match token {
        Token::Char(c) => Some(*c),
        _ => None,
    };
    segment.iter().map(character).collect()
}

/// Whether `segment` matches all of `name`. Adds the cost to `steps`.
pub(super) fn matches(segment: &[Token], name: &str, steps: &mut u64) -> bool {
    let mut pattern = 0;
    let mut at = 0;
    // The last star, and the place from which its successor is tried next.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        *steps += 1;
        let c = name[at..].chars().next();
        let fits = match (segment.get(pattern), c) {
            (Some(Token::Star), _) => {
                retry = Some((pattern, at));
                pattern += 1;
                continue;
            }
            (None, None) => return true,
            (Some(Token::Char(wanted)), Some(c)) => *wanted == c,
            (Some(Token::One), Some(_)) => true,
            (Some(Token::Class(class)), Some(c)) => class.matches(c),
            (None, Some(_)) | (Some(_), None) => false,
        };
        if fits {
            pattern += 1;
            at += c.map_or(0, char::len_utf8);
            continue;
        }
        let Some((star, from)) = retry else {
            return false;
        };
        let Some(skipped) = name[from..].chars().next() else {
            return false;
        };
        at = from + skipped.len_utf8();
        retry = Some((star, at));
        pattern = star + 1;
    }
}

fn tokens(part: &str) -> Result<Segment, Unusable> {
    let mut tokens = Vec::new();
    let mut text = part.chars();
    while let Some(c) = text.next() {
        tokens.push(match c {
            '*' => Token::Star,
            '?' => Token::One,
            '\\' => Token::Char(text.next().ok_or(Unusable)?),
            '[' => {
                let (class, after) = Class::parse(text.as_str())?;
                text = after.chars();
                Token::Class(class)
            }
            c => Token::Char(c),
        });
    }
    tokens.dedup_by(|b, a| *a == Token::Star && *b == Token::Star);
    Ok(tokens)
}

/// Whether nothing in `segment` can match a slash: then names can be matched one by one.
fn within_a_name(segment: &[Token]) -> bool {
    !segment
        .iter()
        .any(|token| matches!(token, Token::Class(class) if class.matches('/')))
}

/// Translates segments; `None` stands for `**`.
fn path_regex(segments: &[Option<Segment>]) -> String {
    let mut regex = String::new();
    let mut after_name = false;
    for segment in segments {
        match segment {
            None if after_name => regex.push_str("(?:/.+)?/"),
            None => regex.push_str("(?:.+/)?"),
            Some(segment) => {
                regex.push_str(if after_name { "/" } else { "" });
                push_segment_regex(segment, &mut regex);
            }
        }
        after_name = segment.is_some();
    }
    regex
}

fn push_segment_regex(segment: &[Token], regex: &mut String) {
    if segment == [Token::Star] {
        regex.push_str("[^/]+");
        return;
    }
    for token in segment {
        match token {
            Token::Char(c) => regex.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
            Token::One => regex.push_str("[^/]"),
            Token::Star => regex.push_str("[^/]*"),
            Token::Class(class) => class.push_regex(regex),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Pattern {
        Pattern::parse(text).unwrap().unwrap()
    }

    fn fits(pattern: &str, name: &str) -> bool {
        matches(&tokens(pattern).unwrap(), name, &mut 0)
    }

    #[test]
    fn a_pattern_is_anchored_by_a_slash_inside_it() {
        assert!(matches!(parse("foo").rest, Rest::Deep(_)));
        assert!(matches!(parse("**/foo").rest, Rest::Deep(_)));
        assert!(matches!(parse("a/foo").rest, Rest::Child(_)));
        assert_eq!(parse("a/b/foo").directory, "a/b");
        assert!(matches!(parse("a/b/**/*.x").rest, Rest::Deep(_)));
        assert!(parse("foo/").below_only);
        assert!(parse("a/**").below_only);
        assert_eq!(parse("a/**").directory, "");
        assert_eq!(parse("*").rest, Rest::Everything);
        assert_eq!(parse("**").rest, Rest::Everything);
        assert_eq!(parse("a/*/b").rest, Rest::Path("[^/]+/b".to_owned()));
        assert_eq!(
            parse("*/**/b").rest,
            Rest::Path("[^/]+(?:/.+)?/b".to_owned())
        );
    }

    #[test]
    fn a_class_that_can_match_a_slash_is_matched_on_the_whole_path() {
        assert!(matches!(parse("x[ab]").rest, Rest::Deep(_)));
        assert!(matches!(parse("x[!ab]").rest, Rest::Path(_)));
        assert!(matches!(parse("x[+-9]").rest, Rest::Path(_)));
    }

    #[test]
    fn lines_that_gitingest_cannot_use_are_told_apart_from_comments() {
        for text in ["[", "[]", "[!]", "a[", "[a/b]", "a\\", "a\\/b", "[z-a]"] {
            assert_eq!(Pattern::parse(text), Err(Unusable), "{text}");
        }
        for text in ["#x", "", " "] {
            assert_eq!(Pattern::parse(text), Ok(None), "{text}");
        }
        assert_eq!(literal(&tokens("\\#x\\!").unwrap()).unwrap(), "#x!");
    }

    #[test]
    fn white_space_at_the_end_is_lost_unless_escaped() {
        for (text, name) in [
            ("a \t", "a"),
            ("a\\ ", "a "),
            ("b \\ ", "b  "),
            ("a\\\\  ", "a\\"),
        ] {
            let Rest::Deep(segment) = parse(text).rest else {
                panic!("{text} is about names");
            };
            assert_eq!(literal(&segment).unwrap(), name);
        }
        assert_eq!(Pattern::parse("a\\  "), Err(Unusable));
    }

    #[test]
    fn names_match_from_end_to_end() {
        for (pattern, name, expected) in [
            ("*.log", ".log", true),
            ("*.log", "a.log.log", true),
            ("*.log", "a.logs", false),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("a?c", "aéc", true),
            ("a?c", "ac", false),
            ("[]a]", "]", true),
            ("[!]a]", "]", false),
            ("[a-]", "-", true),
            ("[--a]", ".", true),
            ("[a\\-z]", "q", true),
            ("[[:alpha:]]", ":]", true),
            ("*", "", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn stars_cost_at_most_the_product_of_the_lengths() {
        let pattern = tokens(&"a*".repeat(100)).unwrap();
        let mut steps = 0;
        assert!(!matches(
            &[&pattern[..], &[Token::Char('b')]].concat(),
            &"a".repeat(250),
            &mut steps
        ));
        assert!(steps < 200 * 250 * 2, "{steps}");
    }
}
