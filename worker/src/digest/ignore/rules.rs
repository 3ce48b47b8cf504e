//! Matches paths against gitingest's default patterns and those of the repository's ignore files.
//!
//! Patterns are grouped by the directory that they apply to, and there by name or suffix in hash
//! tables. However many patterns there are, a name costs a few look-ups and the patterns with unusual
//! wildcards.

use std::collections::HashMap;

use regex::{Regex, RegexBuilder};

use super::pattern::{self, Pattern, Rest, Segment, Token};

/// gitingest's own list (`DEFAULT_IGNORE_PATTERNS` of 0.3.1), sorted.
pub(super) const DEFAULTS: &str = "
**/*.rs.bk *.a *.bak *.bin *.class *.db *.dll *.dylib *.ear *.egg *.egg-info *.exe *.gem *.gif
*.gradle *.ico *.jar *.jpeg *.jpg *.lib *.log *.map *.min.css *.min.js *.mode1v3 *.mode2v3 *.mov
*.mp3 *.mp4 *.nar *.nupkg *.o *.obj *.out *.pbxuser *.pdb *.pdf *.perspectivev3 *.png *.pyc *.pyd
*.pyo *.sln.docstates *.so *.sqlite *.sqlite3 *.sublime-* *.suo *.svg *.swn *.swo *.swp *.temp
*.tfstate* *.tmp *.user *.userosscache *.war *.wav *.whl *.xcodeproj/ *.xcuserstate *.xcworkspace/
.DS_Store .build/ .bundle/ .cache .classpath .coverage .docusaurus .env .eslintcache .git
.gitattributes .gitignore .gitmodules .gradle/ .hg .hypothesis .idea .mypy_cache .next .nox .npm
.nuxt .pnpm-store .project .pytest_cache .ruby-gemset .ruby-version .ruff_cache .rvmrc .sass-cache
.settings .settings/ .svn .swiftpm/ .tox .venv .vs .vscode .yarn Cargo.lock Gemfile.lock
Pipfile.lock Thumbs.db __pycache__ bin/ bower_components build build/ bun.lock bun.lockb
desktop.ini digest.txt dist env gradle-app.setting node_modules obj/ out package-lock.json pkg/
poetry.lock site-packages target target/ vendor/ vendor/bundle venv virtualenv xcuserdata/
yarn.lock";

/// Most patterns that are applied.
pub(in crate::digest) const MAX_PATTERNS: usize = 50_000;
/// Longest pattern that is applied, in bytes. Longer ones can match no path.
const MAX_PATTERN_BYTES: usize = 4_096;
/// Most patterns that need a regular expression of up to 160 KiB each.
const MAX_PATH_PATTERNS: usize = 500;

/// All patterns. The last one that matches decides.
#[derive(Debug)]
pub(in crate::digest) struct Rules {
    groups: HashMap<String, Group>,
    /// By rank. Rank 0 stands for no pattern.
    negated: Vec<bool>,
    last_negation: u32,
    path_patterns: usize,
    overflowed: bool,
}

/// The patterns that apply to one directory's contents.
#[derive(Debug, Default)]
struct Group {
    child: NamePatterns,
    deep: NamePatterns,
    everything: Hit,
    paths: Vec<(Regex, Hit)>,
}

/// Patterns for one name.
#[derive(Debug, Default)]
struct NamePatterns {
    literal: HashMap<String, Hit>,
    /// `*.ext`, by the part after the star.
    suffix: HashMap<String, Hit>,
    other: Vec<(Segment, Hit)>,
}

/// The highest ranks of the patterns that match a path, and that match everything below it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Hit {
    here: u32,
    below: u32,
}

impl Hit {
    fn raise(&mut self, other: Self) {
        self.here = self.here.max(other.here);
        self.below = self.below.max(other.below);
    }
}

/// The groups of patterns that may match in a directory.
#[derive(Clone, Debug)]
pub(in crate::digest) struct ActiveRules<'a> {
    scopes: Vec<Scope<'a>>,
    inherited: u32,
}

#[derive(Clone, Debug)]
struct Scope<'a> {
    group: &'a Group,
    /// Where the path relative to the group's directory begins in the whole path.
    offset: usize,
    /// Whether this is the group's own directory.
    direct: bool,
    /// Whether a newline lies between, which pathspec's `.` does not match.
    newline: bool,
}

/// How the patterns match one path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::digest) struct RuleMatch {
    /// The path is left out.
    pub(in crate::digest) ignored: bool,
    /// Nothing below the path can be shown.
    pub(in crate::digest) pruned: bool,
    below: u32,
}

impl Rules {
    /// Returns gitingest's defaults.
    pub(in crate::digest) fn new() -> Self {
        let mut rules = Self {
            groups: HashMap::new(),
            negated: vec![false],
            last_negation: 0,
            path_patterns: 0,
            overflowed: false,
        };
        for text in DEFAULTS.split_ascii_whitespace() {
            rules.add_pattern(text);
        }
        rules
    }

    /// Adds the lines of an ignore file in `directory` (`""` for the root). A file that is not UTF-8
    /// is skipped, since gitingest fails on it.
    pub(in crate::digest) fn add_file(&mut self, directory: &str, bytes: &[u8]) {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return;
        };
        for pattern in patterns(directory, text) {
            self.add_pattern(&pattern);
            if self.overflowed {
                return;
            }
        }
    }

    /// Whether patterns were left out.
    pub(in crate::digest) fn overflowed(&self) -> bool {
        self.overflowed
    }

    fn add_pattern(&mut self, text: &str) {
        if self.negated.len() > MAX_PATTERNS {
            self.overflowed = true;
            return;
        }
        if text.len() > MAX_PATTERN_BYTES {
            return;
        }
        let Ok(Some(pattern)) = Pattern::parse(text) else {
            return;
        };
        let rank = self.negated.len() as u32;
        let hit = Hit {
            here: if pattern.below_only { 0 } else { rank },
            below: rank,
        };
        let group = self.groups.entry(pattern.directory).or_default();
        match pattern.rest {
            Rest::Everything => group.everything.raise(hit),
            Rest::Child(segment) => group.child.add(segment, hit),
            Rest::Deep(segment) => group.deep.add(segment, hit),
            Rest::Path(regex) => {
                if self.path_patterns == MAX_PATH_PATTERNS {
                    self.overflowed = true;
                    return;
                }
                let regex = RegexBuilder::new(&format!("^{regex}$"))
                    .size_limit(64 << 10)
                    .dfa_size_limit(96 << 10)
                    .build();
                // Fails over the size limit: a pattern of hundreds of wildcards.
                let Ok(regex) = regex else {
                    return;
                };
                self.path_patterns += 1;
                group.paths.push((regex, hit));
            }
        }
        self.negated.push(pattern.negated);
        if pattern.negated {
            self.last_negation = rank;
        }
    }

    /// Returns the rules for the repository's root.
    pub(in crate::digest) fn root(&self) -> ActiveRules<'_> {
        let mut root = ActiveRules {
            scopes: Vec::new(),
            inherited: 0,
        };
        root.enter(self, "");
        root
    }

    /// Matches `name` in a directory with the rules `active`. `path` is the whole path, `name` included.
    /// Adds the cost to `steps`.
    pub(in crate::digest) fn judge(
        &self,
        active: &ActiveRules<'_>,
        path: &str,
        name: &str,
        steps: &mut u64,
    ) -> RuleMatch {
        let mut hit = Hit::default();
        for scope in &active.scopes {
            scope.find(path, name, steps, &mut hit);
        }
        // `$` also matches before a newline at the very end.
        if let (Some(path), Some(name)) = (path.strip_suffix('\n'), name.strip_suffix('\n')) {
            let mut ending = Hit::default();
            for scope in &active.scopes {
                scope.find(path, name, steps, &mut ending);
            }
            hit.here = hit.here.max(ending.here);
        }
        let here = hit.here.max(active.inherited);
        let below = hit.below.max(active.inherited);
        let excludes = |rank: u32| rank != 0 && !self.negated[rank as usize];
        RuleMatch {
            ignored: excludes(here),
            pruned: excludes(here) || (excludes(below) && self.last_negation < below),
            below,
        }
    }
}

impl<'a> ActiveRules<'a> {
    /// Returns the rules for the child `name` of this directory, whose whole path is `path`.
    pub(in crate::digest) fn child(
        &self,
        rules: &'a Rules,
        path: &str,
        name: &str,
        verdict: RuleMatch,
    ) -> Self {
        let newline = name.contains('\n');
        let reaching = self
            .scopes
            .iter()
            .filter(|scope| scope.group.reaches_deep());
        let scopes = reaching.map(|scope| Scope {
            direct: false,
            newline: scope.newline || newline,
            ..*scope
        });
        let mut child = Self {
            scopes: scopes.collect(),
            inherited: verdict.below,
        };
        child.enter(rules, path);
        child
    }

    fn enter(&mut self, rules: &'a Rules, path: &str) {
        if let Some(group) = rules.groups.get(path) {
            self.scopes.push(Scope {
                group,
                offset: if path.is_empty() { 0 } else { path.len() + 1 },
                direct: true,
                newline: false,
            });
        }
    }
}

impl Scope<'_> {
    fn find(&self, path: &str, name: &str, steps: &mut u64, hit: &mut Hit) {
        let mut everything = self.group.everything;
        if path.bytes().all(|byte| byte == b'\n') {
            // It is pathspec's `.`, which is to be anywhere in the path.
            everything.here = 0;
        }
        hit.raise(everything);
        if self.direct {
            self.group.child.find(name, steps, hit);
        }
        if !self.newline {
            self.group.deep.find(name, steps, hit);
        }
        let relative = &path[self.offset..];
        for (regex, rank) in &self.group.paths {
            *steps += 16 + 4 * relative.len() as u64;
            if regex.is_match(relative) {
                hit.raise(*rank);
            }
        }
    }
}

impl Group {
    /// Whether any pattern can match more than one level below the directory.
    fn reaches_deep(&self) -> bool {
        !self.deep.is_empty() || !self.paths.is_empty() || self.everything != Hit::default()
    }
}

impl NamePatterns {
    fn is_empty(&self) -> bool {
        self.literal.is_empty() && self.suffix.is_empty() && self.other.is_empty()
    }

    fn add(&mut self, segment: Segment, hit: Hit) {
        if let Some(name) = pattern::literal(&segment) {
            self.literal.entry(name).or_default().raise(hit);
            return;
        }
        if let [Token::Star, suffix @ ..] = segment.as_slice()
            && suffix.first() == Some(&Token::Char('.'))
            && let Some(suffix) = pattern::literal(suffix)
        {
            self.suffix.entry(suffix).or_default().raise(hit);
            return;
        }
        self.other.push((segment, hit));
    }

    fn find(&self, name: &str, steps: &mut u64, hit: &mut Hit) {
        *steps += 1;
        if let Some(found) = self.literal.get(name) {
            hit.raise(*found);
        }
        if !self.suffix.is_empty() {
            for (dot, _) in name.match_indices('.') {
                *steps += 1;
                if let Some(found) = self.suffix.get(&name[dot..]) {
                    hit.raise(*found);
                }
            }
        }
        for (segment, found) in &self.other {
            // A lower rank cannot change the result.
            if (found.here > hit.here || found.below > hit.below)
                && pattern::matches(segment, name, steps)
            {
                hit.raise(*found);
            }
        }
    }
}

/// Returns the patterns in the lines of an ignore file in `directory`.
pub(super) fn patterns(directory: &str, text: &str) -> impl Iterator<Item = String> {
    let lines = text.split(['\n', '\r']);
    let lines = lines.map(|line| line.trim_matches(pattern::is_python_space));
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(move |line| match line.strip_prefix('!') {
        Some(line) => format!("!{}", joined(directory, line)),
        None => joined(directory, line),
    })
}

/// Returns Python's `(Path(directory) / line).as_posix()` for a line without leading slashes: empty and
/// `.` segments vanish, and a trailing slash with them.
fn joined(directory: &str, line: &str) -> String {
    let parts = [directory].into_iter().chain(line.split('/'));
    let parts: Vec<&str> = parts.filter(|part| !matches!(*part, "" | ".")).collect();
    match parts.as_slice() {
        [] => ".".to_owned(),
        parts => parts.join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks down to `path` as a digest does and says whether it is left out.
    fn ignored(rules: &Rules, path: &str) -> bool {
        let mut place = rules.root();
        let mut end = 0;
        loop {
            let start = end;
            end = path[start..].find('/').map_or(path.len(), |i| start + i);
            let (current, name) = (&path[..end], &path[start..end]);
            let verdict = rules.judge(&place, current, name, &mut 0);
            if verdict.ignored || end == path.len() {
                return verdict.ignored;
            }
            if verdict.pruned {
                return true;
            }
            place = place.child(rules, current, name, verdict);
            end += 1;
        }
    }

    fn rules(files: &[(&str, &str)]) -> Rules {
        let mut rules = Rules::new();
        for (directory, text) in files {
            rules.add_file(directory, text.as_bytes());
        }
        rules
    }

    #[test]
    fn there_are_133_defaults() {
        assert_eq!(DEFAULTS.split_ascii_whitespace().count(), 133);
        assert_eq!(Rules::new().negated.len(), 134);
    }

    #[test]
    fn defaults_hit_files_and_directories_at_any_depth() {
        let rules = rules(&[]);
        for path in [
            "a.pyc",
            "x/y/a.pyc",
            "node_modules",
            "x/node_modules/y",
            "env",
            "x/env",
            "bin/x",
            "x/bin/y/z",
            "a.tfstate.backup",
            "x.sublime-project",
            ".gitignore",
            "x/digest.txt",
            "vendor/bundle",
            "x.xcodeproj/y",
            "a.rs.bk",
            ".settings",
            ".bundle/config",
        ] {
            assert!(ignored(&rules, path), "{path}");
        }
        for path in [
            "bin",
            "vendor",
            "x.xcodeproj",
            ".gitingestignore",
            "go.sum",
            "A.PYC",
            "environment",
            "x/.github/y",
            "log",
            "pkg",
        ] {
            assert!(!ignored(&rules, path), "{path}");
        }
    }

    #[test]
    fn lines_lose_their_slashes_at_both_ends() {
        let rules = rules(&[(
            "",
            "/only\ndirish/\n//a//./b/\n  # no\n#no\n spaced \r\nx\rz",
        )]);
        for path in [
            "only", "x/only", "dirish", "q/dirish", "a/b", "a/b/c", "spaced", "x", "z",
        ] {
            assert!(ignored(&rules, path), "{path}");
        }
        assert!(!ignored(&rules, "x1/a/b"));
        assert!(!ignored(&rules, "no"));
    }

    #[test]
    fn a_nested_file_speaks_of_one_level_only() {
        let rules = rules(&[("sub", "*.txt\nname\n/lead\ndeep/**/x\n*.?a")]);
        for path in [
            "sub/a.txt",
            "sub/name",
            "sub/lead/x",
            "sub/deep/x",
            "sub/deep/a/b/x",
        ] {
            assert!(ignored(&rules, path), "{path}");
        }
        for path in ["a.txt", "sub/d/a.txt", "sub/d/name", "name", "sub/x"] {
            assert!(!ignored(&rules, path), "{path}");
        }
        let slash = super::tests::rules(&[("sub", "/")]);
        assert!(ignored(&slash, "sub/a") && ignored(&slash, "sub") && !ignored(&slash, "a"));
        assert!(!ignored(&super::tests::rules(&[("", "/")]), "a"));
    }

    #[test]
    fn a_directory_with_wildcards_in_its_name_is_read_as_a_pattern() {
        let rules = rules(&[("[ab]", "x"), ("#c", "x"), ("!d", "bin.log")]);
        assert!(ignored(&rules, "a/x") && ignored(&rules, "b/x"));
        assert!(!ignored(&rules, "[ab]/x") && !ignored(&rules, "#c/x"));
        assert!(ignored(&rules, "!d/bin.log") && !ignored(&rules, "d/bin.log"));
    }

    #[test]
    fn the_last_match_wins() {
        let rules = rules(&[("", "*.txt\n!keep.txt\n!bin/\nbin/x"), ("s", "keep.txt")]);
        assert!(ignored(&rules, "a.txt") && !ignored(&rules, "d/keep.txt"));
        assert!(ignored(&rules, "s/keep.txt"));
        assert!(ignored(&rules, "bin/x") && !ignored(&rules, "bin/y"));
    }

    #[test]
    fn what_gitingest_would_fail_on_is_passed_over() {
        let mut rules = rules(&[("", "a\\\n[z-a]\n[\n!\nlast")]);
        rules.add_file("", b"\xffoops\nnever");
        assert!(ignored(&rules, "last") && !ignored(&rules, "never"));
        assert!(!ignored(&rules, "a") && !ignored(&rules, "["));
    }

    #[test]
    fn star_and_double_star_leave_nothing() {
        for line in ["*", "**", "**/", "**/*", "./*"] {
            assert!(ignored(&rules(&[("", line)]), "a"), "{line}");
            assert!(ignored(&rules(&[("", line)]), "b/c"), "{line}");
        }
        let nested = rules(&[("s", "**")]);
        assert!(ignored(&nested, "s/a/b") && !ignored(&nested, "s") && !ignored(&nested, "a"));
    }

    #[test]
    fn newlines_in_names_behave_as_in_python() {
        let rules = rules(&[("", "foo\nx[!q]y")]);
        assert!(ignored(&rules, "foo\n") && !ignored(&rules, "a\nb/foo"));
        assert!(ignored(&rules, "x/y"));
        for line in ["*", "**", "**/*"] {
            let rules = super::tests::rules(&[("", line)]);
            for (path, expected) in [
                ("\n", false),
                ("\n\n", false),
                ("a\n", true),
                ("\n/\n", true),
            ] {
                assert_eq!(ignored(&rules, path), expected, "{line} {path:?}");
            }
        }
        let one = super::tests::rules(&[("", "?")]);
        assert!(ignored(&one, "\n\n") && !ignored(&one, "\n\n\n"));
    }

    #[test]
    fn the_list_is_bounded() {
        let mut rules = Rules::new();
        rules.add_file("", "x\n".repeat(MAX_PATTERNS + 1).as_bytes());
        assert!(rules.overflowed());
        let mut rules = Rules::new();
        rules.add_file("", "a/*/b\n".repeat(MAX_PATH_PATTERNS + 1).as_bytes());
        assert!(rules.overflowed());
        let mut rules = Rules::new();
        rules.add_file("", "?".repeat(MAX_PATTERN_BYTES).as_bytes());
        rules.add_file("", format!("a/{}/b", "[!a]".repeat(1000)).as_bytes());
        assert!(!rules.overflowed());
    }
}
