//! Which paths are left out: gitingest's defaults and what the repository's ignore files say.
//!
//! Patterns are filed under the directory that they are about, and there by what a hash look-up
//! can find: a walk asks about each name once, and a name costs a few look-ups and the patterns
//! with odd wildcards, of whatever length the list is.

use std::collections::HashMap;

use regex::{Regex, RegexBuilder};

use super::pattern::{self, Pattern, Rest, Segment, Token};

/// gitingest's own list (`DEFAULT_IGNORE_PATTERNS` of 0.3.1), sorted.
const DEFAULTS: &str = "
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

/// Most patterns that are applied; the rest of a longer list is left out.
pub(in crate::digest) const MAX_PATTERNS: usize = 50_000;
/// Longest pattern that is applied, in bytes. A longer one could match no path.
const MAX_PATTERN_BYTES: usize = 4_096;
/// Most patterns that need a regular expression, since each may take up to 160 KiB.
const MAX_PATH_PATTERNS: usize = 500;

/// All patterns, in the order in which the last match decides.
#[derive(Debug)]
pub(in crate::digest) struct Rules {
    groups: HashMap<String, Group>,
    /// By rank; rank 0 is no pattern at all.
    negated: Vec<bool>,
    last_negation: u32,
    path_patterns: usize,
    overflowed: bool,
}

/// The patterns about what lies in one directory.
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
    /// `*.ext`, by what follows the star.
    suffix: HashMap<String, Hit>,
    other: Vec<(Segment, Hit)>,
}

/// The highest rank of the patterns that match a path, and that match what is below it.
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

/// Where a walk stands: the directories above whose patterns may still match.
#[derive(Clone, Debug)]
pub(in crate::digest) struct ActiveRules<'a> {
    scopes: Vec<Scope<'a>>,
    inherited: u32,
}

#[derive(Clone, Debug)]
struct Scope<'a> {
    group: &'a Group,
    /// Where a path below the group's directory begins within the whole path.
    offset: usize,
    /// Directly in the group's directory.
    direct: bool,
    /// A newline lies between, which pathspec's `.` does not match.
    newline: bool,
}

/// What the patterns say about one path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::digest) struct RuleMatch {
    /// Left out.
    pub(in crate::digest) ignored: bool,
    /// For a directory: nothing in it can be shown.
    pub(in crate::digest) pruned: bool,
    below: u32,
}

impl Rules {
    /// gitingest's defaults alone.
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

    /// Adds the lines of an ignore file in `directory` (`""` for the root). Bytes that are not
    /// UTF-8 make the whole file void, since gitingest fails on them.
    pub(in crate::digest) fn add_file(&mut self, directory: &str, bytes: &[u8]) {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return;
        };
        for raw in text.split(['\n', '\r']) {
            let line = raw.trim_matches(pattern::is_python_space);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (negation, line) = match line.strip_prefix('!') {
                Some(line) => ("!", line),
                None => ("", line),
            };
            let body = joined(directory, line);
            self.add_pattern(&format!("{negation}{body}"));
            if self.overflowed {
                return;
            }
        }
    }

    /// Whether there were more patterns than are applied.
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
                // Over the size limit: a pattern of hundreds of wildcards.
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

    /// The repository's root.
    pub(in crate::digest) fn root(&self) -> ActiveRules<'_> {
        let mut place = ActiveRules {
            scopes: Vec::new(),
            inherited: 0,
        };
        place.enter(self, "");
        place
    }

    /// What the patterns say about `name` in the directory `place`, whose whole path is `path`
    /// (`name` included). Adds what it cost to `steps`.
    pub(in crate::digest) fn judge(
        &self,
        place: &ActiveRules<'_>,
        path: &str,
        name: &str,
        steps: &mut u64,
    ) -> RuleMatch {
        let mut hit = Hit::default();
        for scope in &place.scopes {
            scope.find(path, name, steps, &mut hit);
        }
        // `$` also matches before a newline at the very end.
        if let (Some(path), Some(name)) = (path.strip_suffix('\n'), name.strip_suffix('\n')) {
            let mut ending = Hit::default();
            for scope in &place.scopes {
                scope.find(path, name, steps, &mut ending);
            }
            hit.here = hit.here.max(ending.here);
        }
        let here = hit.here.max(place.inherited);
        let below = hit.below.max(place.inherited);
        let excludes = |rank: u32| rank != 0 && !self.negated[rank as usize];
        RuleMatch {
            ignored: excludes(here),
            pruned: excludes(here) || (excludes(below) && self.last_negation < below),
            below,
        }
    }
}

impl<'a> ActiveRules<'a> {
    /// The directory `path`, a child of this one with the last component `name`.
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
        let mut place = Self {
            scopes: scopes.collect(),
            inherited: verdict.below,
        };
        place.enter(rules, path);
        place
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
        hit.raise(self.group.everything);
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
    /// Whether any of it can match more than one level down.
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
            // A pattern of lower rank than what matched already cannot change the verdict.
            if (found.here > hit.here || found.below > hit.below)
                && pattern::matches(segment, name, steps)
            {
                hit.raise(*found);
            }
        }
    }
}

/// What `(Path(directory) / line).as_posix()` gives in Python, after gitingest took leading slashes
/// off: empty and `.` segments vanish, and with them a slash at the end.
fn joined(directory: &str, line: &str) -> String {
    let mut path = directory.to_owned();
    for part in line.split('/').filter(|part| !matches!(*part, "" | ".")) {
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(part);
    }
    if path.is_empty() {
        path.push('.');
    }
    path
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
