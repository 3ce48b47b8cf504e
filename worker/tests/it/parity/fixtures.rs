//! Repositories that cover gitingest's rules. gitingest's digest of each is committed.

use std::path::{Path, PathBuf};

use testing::repositories::{Builder, empty};

/// The owner of all of them. gitingest prints it in lower case.
pub(crate) const OWNER: &str = "Fixture-Org";

/// A repository with an expected digest.
#[derive(Debug)]
pub(crate) struct Fixture {
    /// The repository's name.
    pub(crate) name: &'static str,
    /// The origin of the expected text.
    pub(crate) expected: Expected,
    /// Its contents; `None` for a repository without commits.
    builder: Option<Builder>,
}

/// The origin of an expected text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// gitingest.
    Gitingest,
    /// Our own decision, for the given reason: gitingest's text changes from run to run, does not exist,
    /// or shows a checkout instead of the commit.
    Decided(&'static str),
}

impl Fixture {
    /// Writes the repository to `ROOT/{OWNER}/{name}.git`.
    ///
    /// # Panics
    /// If git is missing or fails.
    pub(crate) fn build(&self, root: &Path) -> PathBuf {
        match &self.builder {
            Some(builder) => builder.build(root, OWNER, self.name),
            None => empty(root, OWNER, self.name),
        }
    }
}

/// Returns all fixtures.
pub(crate) fn fixtures() -> Vec<Fixture> {
    let by_gitingest = [
        ("one-file", one_file()),
        ("order", order()),
        ("tree-shapes", tree_shapes()),
        ("links", links()),
        ("bodies", bodies()),
        ("undecodable", undecodable()),
        ("sizes", sizes()),
        ("odd-names", odd_names()),
        ("notebooks", notebooks()),
        ("broken-notebooks", broken_notebooks()),
        ("default-patterns", default_patterns()),
        ("root-ignore-file", root_ignore_file()),
        ("nested-ignore-files", nested_ignore_files()),
        ("pattern-syntax", pattern_syntax()),
        ("everything-ignored", everything_ignored()),
        ("wildcard-directories", wildcard_directories()),
        ("depth", depth()),
        ("Upper.Case_Name", one_file()),
        ("special-tokens", special_tokens()),
    ];
    let decided = [
        (
            "negations",
            "the order of patterns depends on the hash seed",
            Some(negations()),
        ),
        (
            "case-twins",
            "their order depends on the file system",
            Some(case_twins()),
        ),
        (
            "broken-ignore-files",
            "gitingest gives up",
            Some(broken_ignore_files()),
        ),
        (
            "attributes",
            "gitingest shows a checkout",
            Some(attributes()),
        ),
        ("latin-names", "gitingest gives up", Some(latin_names())),
        ("no-commit", "gitingest gives up", None),
    ];
    let by_gitingest = by_gitingest.map(|(name, builder)| Fixture {
        name,
        expected: Expected::Gitingest,
        builder: Some(builder),
    });
    let decided = decided.map(|(name, why, builder)| Fixture {
        name,
        expected: Expected::Decided(why),
        builder,
    });
    by_gitingest.into_iter().chain(decided).collect()
}

fn files(paths: &[&str]) -> Builder {
    let add = |builder: Builder, path: &&str| builder.file(path, format!("{path}\n"));
    paths.iter().fold(Builder::new(), add)
}

fn one_file() -> Builder {
    Builder::new().file("README.md", "# One\n\nHello, world.\n")
}

/// Every group of the order of children, and neighbours in it.
fn order() -> Builder {
    files(&[
        "zebra.txt",
        "Apple.txt",
        "apple2.txt",
        "_u.txt",
        "~t.txt",
        "0.txt",
        "ReadMe.rst",
        "readme",
        "readmes.txt",
        "xREADME",
        ".dot",
        ".Also",
        ".readme.md",
        "dir/b",
        "dir/README.md",
        "dir/A",
        "Dir2/x",
        ".github/workflows/ci.yml",
        "README.d/x",
        "readme.dir/y",
        "éa.txt",
        "Éb.txt",
        "zz/README",
        "İ.txt",
        "ẞ.txt",
        "ss.txt",
        "日本.txt",
        "Ω.txt",
        "Σας.txt",
    ])
    .symlink("README.link", "zebra.txt")
    .symlink("link_to_file", "Apple.txt")
    .symlink(".dotlink", "dir")
    .executable("run.sh", "#!/bin/sh\n")
}

/// First, middle and last children at several levels; directories that vanish.
fn tree_shapes() -> Builder {
    files(&[
        "a/b/c/d.txt",
        "a/b/e.txt",
        "a/f/g.txt",
        "h/i.txt",
        "h/j/k/l/m.txt",
        "n.txt",
        "only/ignored/build/x",
        "only/bin/y",
        "o/node_modules/z",
        "o/p.txt",
    ])
    .submodule("module")
    .submodule("deps/other")
}

/// Links to files, directories, nowhere, and out of the repository.
fn links() -> Builder {
    files(&["target.txt", "src/a.txt"])
        .symlink("file", "target.txt")
        .symlink("directory", "src/")
        .symlink("nowhere", "not/there")
        .symlink("outside", "../outside/deep/t.txt")
        .symlink("passwd", "/etc/passwd")
        .symlink("up", "..")
        .symlink("here", ".")
        .symlink("root", "/")
        .symlink("itself", "itself")
        .symlink("dot-end", "src/.")
        .symlink("a.log", "target.txt")
        .symlink("book.ipynb", "target.txt")
        .symlink("src/z", "../target.txt")
        .symlink("links-only/one", "x")
        .symlink("links-only/two", "y")
}

/// Every rule for a file's text, except for late decoding errors.
fn bodies() -> Builder {
    let utf16: Vec<u8> = "\u{feff}hi\n"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    Builder::new()
        .file("empty", "")
        .file("blank", "\n")
        .file("no-newline", "x")
        .file("newlines", "a\r\nb\rc\n\r\r\n\n\rd\r")
        .file("bom", "\u{feff}bom\n")
        .file("nul", "a\0b\n")
        .file("separators", "a\u{2028}b\u{85}c\x0cd\x0be\x1cf\n")
        .file("image.jpg.txt", "no image")
        .file("utf16", utf16)
        .file("latin1", b"caf\xe9\n")
        .file("emoji", "😀 日本 ä\n")
        .file("boundary-whole", format!("{}é\n", "x".repeat(1022)))
        .file("boundary-cut", format!("{}é\n", "x".repeat(1023)))
        .file("boundary-exact", "y".repeat(1024))
        .file("boundary-bad-last", [&[b'x'; 1023], &b"\xff"[..]].concat())
        .file(
            "header-like",
            format!("{0}\nFILE: x\n{0}\n\n\n", "=".repeat(48)),
        )
        .file("trailing", "text\n\n\n\n")
        .executable("script", "#!/bin/sh\r\necho\r\n")
}

/// Bytes after the first kibibyte that are not UTF-8, for each of Python's reasons.
fn undecodable() -> Builder {
    let tails: [(&str, &[u8]); 12] = [
        ("start-ff", b"\xff"),
        ("start-80", b"\x80"),
        ("start-c0", b"\xc0\x80"),
        ("start-f5", b"\xf5\x80\x80\x80"),
        ("continuation-2", b"\xc3("),
        ("continuation-3", b"\xe2\x82("),
        ("continuation-4", b"\xf0\x9f\x98("),
        ("surrogate", b"\xed\xa0\x80"),
        ("overlong", b"\xe0\x80\x80"),
        ("end-1", b"abc\xe2"),
        ("end-2", b"\xe2\x82"),
        ("end-3", b"\r\n\xf0\x9f\x98"),
    ];
    let add = |builder: Builder, (name, tail): (&str, &[u8])| {
        builder.file(name, [&[b'x'; 1024], tail].concat())
    };
    tails.into_iter().fold(Builder::new(), add)
}

/// At and over the limits of 512 KiB and 10 MiB. All binary, so that the text stays short.
fn sizes() -> Builder {
    let mut builder = Builder::new().file("small", "small\n");
    for (name, size) in [
        ("512k", 512 << 10),
        ("512k-and-1", (512 << 10) + 1),
        ("10m", 10 << 20),
        ("10m-and-1", (10 << 20) + 1),
    ] {
        builder = builder
            .file(name, vec![0xff; size])
            .file(format!("only-{name}/x"), vec![0xfe; size]);
    }
    builder
}

/// Names that need care in a tree of lines.
fn odd_names() -> Builder {
    files(&[
        "two\nlines.txt",
        "foo\n",
        "tab\there",
        "bell\x07",
        "esc\x1b[31m",
        " leading",
        "trailing ",
        "back\\slash",
        "quote\"s",
        "...",
        "..a",
        "-dash",
        "--",
        "#hash",
        "!bang",
        "*star",
        "?",
        "[x]/y",
        "a\nb/foo",
        "a\nb/c",
        "é/ü",
        "name with spaces/x y",
        "$HOME",
        "`x`",
        "a:b",
    ])
    .file("l/".repeat(3) + &"n".repeat(255), "long name\n")
    .file(".gitignore", "foo\n")
}

/// Every kind of cell and output.
fn notebooks() -> Builder {
    Builder::new()
        .file("all.ipynb", ALL_CELLS)
        .file(
            "sub/worksheets.ipynb",
            r#"{"worksheets":[
            {"cells":[{"cell_type":"markdown","source":["one"]}]},
            {"cells":[{"cell_type":"code","source":"two","outputs":[]}]}],"cells":[1]}"#,
        )
        .file(
            "no-worksheets.ipynb",
            r#"{"worksheets":[],"cells":[
            {"cell_type":"raw","source":"kept"}]}"#,
        )
        .file("no-cells.ipynb", r#"{"cells":[]}"#)
        .file(
            "twice.ipynb",
            r#"{"cells":[1],"cells":[{"cell_type":"raw","source":"last"}]}"#,
        )
        .file(
            "numbers.ipynb",
            r#"{"x":[NaN,Infinity,-Infinity,1e400,-0],"cells":[]}"#,
        )
        .file(
            "deep.ipynb",
            format!(
                "{{\"x\":{}{},\"cells\":[]}}",
                "[".repeat(900),
                "]".repeat(900)
            ),
        )
        .file(
            "escapes.ipynb",
            r#"{"cells":[{"cell_type":"code",
            "source":"a\u00e9\ud83d\ude00\t\"\\\/\b\f\r\n"}]}"#,
        )
        .file("crlf.ipynb", "{\r\n\"cells\":\r\n[]}\r\n")
        .file(".ipynb", "not a notebook by its suffix\n")
        .file("upper.IPYNB", "not a notebook either\n")
        .file("..ipynb", "{}")
}

const ALL_CELLS: &str = r##"{"cells":[
 {"cell_type":"markdown","metadata":{},"source":["# Title\n","\n","text"]},
 {"cell_type":"markdown","source":"one string"},
 {"cell_type":"raw","source":["raw ","text"]},
 {"cell_type":"code","source":["import x\n","x()"],"outputs":[]},
 {"cell_type":"code","source":["no outputs key"]},
 {"cell_type":"code","source":[]},
 {"cell_type":"markdown","source":""},
 {"cell_type":"code","source":"","outputs":[{"output_type":"unheard of"}]},
 {"cell_type":"code","source":"s","outputs":[
   {"output_type":"stream","name":"stdout","text":["one\n","two\n","three"]},
   {"output_type":"stream","name":"stderr","text":"abc"}]},
 {"cell_type":"code","source":"d","outputs":[
   {"output_type":"display_data","data":{"image/png":"xxxx","text/plain":["<Figure>"]}},
   {"output_type":"execute_result","data":{"text/plain":"42","application/json":{"a":NaN}}},
   {"output_type":"error","ename":"ValueError","evalue":"bad","traceback":["t"]}]},
 {"cell_type":"code","source":"e","outputs":[{"output_type":"stream","text":[]}]},
 {"cell_type":"code","source":"k","outputs":[{"output_type":"stream","text":{"k1":1,"k2":2,"k1":3}}]},
 {"cell_type":"code","source":{"key1":1,"key2":2}}
],"metadata":{"kernelspec":{}},"nbformat":4,"nbformat_minor":5}"##;

/// One for each way in which a notebook fails.
fn broken_notebooks() -> Builder {
    let code = |rest: &str| format!(r#"{{"cells":[{{"cell_type":"code","source":"s",{rest}}}]}}"#);
    let texts = [
        ("empty", String::new()),
        ("not-json", "{".to_owned()),
        ("extra", "{} {}".to_owned()),
        ("bom", "\u{feff}{}".to_owned()),
        ("control", "{\"a\":\"\u{1}\"}".to_owned()),
        ("list", "[]".to_owned()),
        ("string", "\"cells\"".to_owned()),
        ("number", "1".to_owned()),
        ("float", "1.5".to_owned()),
        ("null", "null".to_owned()),
        ("true", "true".to_owned()),
        ("nan", "NaN".to_owned()),
        ("no-cells", "{}".to_owned()),
        ("cells-null", r#"{"cells":null}"#.to_owned()),
        ("cells-number", r#"{"cells":3}"#.to_owned()),
        ("cells-string", r#"{"cells":"abc"}"#.to_owned()),
        ("cells-dict", r#"{"cells":{"a":1}}"#.to_owned()),
        ("cell-null", r#"{"cells":[null]}"#.to_owned()),
        ("cell-list", r#"{"cells":[[]]}"#.to_owned()),
        ("cell-string", r#"{"cells":["x"]}"#.to_owned()),
        ("no-type", r#"{"cells":[{}]}"#.to_owned()),
        (
            "odd-type",
            r#"{"cells":[{"cell_type":"heading","source":"x"}]}"#.to_owned(),
        ),
        ("null-type", r#"{"cells":[{"cell_type":null}]}"#.to_owned()),
        ("true-type", r#"{"cells":[{"cell_type":true}]}"#.to_owned()),
        (
            "no-source",
            r#"{"cells":[{"cell_type":"code"}]}"#.to_owned(),
        ),
        (
            "source-number",
            r#"{"cells":[{"cell_type":"raw","source":1}]}"#.to_owned(),
        ),
        (
            "source-null",
            r#"{"cells":[{"cell_type":"raw","source":null}]}"#.to_owned(),
        ),
        (
            "source-mixed",
            r#"{"cells":[{"cell_type":"raw","source":["a",{},1]}]}"#.to_owned(),
        ),
        ("worksheets-true", r#"{"worksheets":true}"#.to_owned()),
        ("worksheets-number", r#"{"worksheets":2}"#.to_owned()),
        ("worksheets-string", r#"{"worksheets":"ab"}"#.to_owned()),
        (
            "worksheets-dict",
            r#"{"worksheets":{"cells":[]}}"#.to_owned(),
        ),
        ("worksheet-empty", r#"{"worksheets":[{}]}"#.to_owned()),
        (
            "worksheet-number",
            r#"{"worksheets":[{"cells":1}]}"#.to_owned(),
        ),
        ("outputs-number", code(r#""outputs":1"#)),
        ("outputs-string", code(r#""outputs":"x""#)),
        ("outputs-null-item", code(r#""outputs":[null]"#)),
        ("no-output-type", code(r#""outputs":[{}]"#)),
        (
            "odd-output-type",
            code(r#""outputs":[{"output_type":"pyout"}]"#),
        ),
        ("no-text", code(r#""outputs":[{"output_type":"stream"}]"#)),
        (
            "null-text",
            code(r#""outputs":[{"output_type":"stream","text":null}]"#),
        ),
        (
            "mixed-text",
            code(r#""outputs":[{"output_type":"stream","text":["a",null]}]"#),
        ),
        (
            "no-data",
            code(r#""outputs":[{"output_type":"execute_result"}]"#),
        ),
        (
            "list-data",
            code(r#""outputs":[{"output_type":"execute_result","data":[]}]"#),
        ),
        (
            "no-plain",
            code(r#""outputs":[{"output_type":"display_data","data":{}}]"#),
        ),
        ("no-ename", code(r#""outputs":[{"output_type":"error"}]"#)),
        (
            "no-evalue",
            code(r#""outputs":[{"output_type":"error","ename":"E"}]"#),
        ),
        (
            "null-error",
            code(r#""outputs":[{"output_type":"error","ename":null,"evalue":true}]"#),
        ),
        ("too-deep", "[".repeat(3000)),
        ("too-deep-objects", "{\"a\":".repeat(3000)),
    ];
    let builder = Builder::new().file("not-utf-8.ipynb", b"{\"a\": \"\xff\"}");
    texts.into_iter().fold(builder, |builder, (name, text)| {
        builder.file(format!("d/{name}.ipynb"), text)
    })
}

/// A path for each default pattern, at the root and below, and near misses.
fn default_patterns() -> Builder {
    let mut builder = Builder::new();
    for directory in ["", "sub/deep/"] {
        for name in [
            "x.rs.bk",
            "x.a",
            "x.bak",
            "x.bin",
            "x.class",
            "x.db",
            "x.dll",
            "x.dylib",
            "x.ear",
            "x.egg",
            "x.egg-info",
            "x.exe",
            "x.gem",
            "x.gif",
            "x.gradle",
            "x.ico",
            "x.jar",
            "x.jpeg",
            "x.jpg",
            "x.lib",
            "x.log",
            "x.map",
            "x.min.css",
            "x.min.js",
            "x.mode1v3",
            "x.mode2v3",
            "x.mov",
            "x.mp3",
            "x.mp4",
            "x.nar",
            "x.nupkg",
            "x.o",
            "x.obj",
            "x.out",
            "x.pbxuser",
            "x.pdb",
            "x.pdf",
            "x.perspectivev3",
            "x.png",
            "x.pyc",
            "x.pyd",
            "x.pyo",
            "x.sln.docstates",
            "x.so",
            "x.sqlite",
            "x.sqlite3",
            "x.sublime-project",
            "x.suo",
            "x.svg",
            "x.swn",
            "x.swo",
            "x.swp",
            "x.temp",
            "x.tfstate",
            "x.tfstate.backup",
            "x.tmp",
            "x.user",
            "x.userosscache",
            "x.war",
            "x.wav",
            "x.whl",
            "x.xcodeproj/y",
            "x.xcuserstate",
            "x.xcworkspace/y",
            ".DS_Store",
            ".build/y",
            ".bundle/y",
            ".cache",
            ".classpath",
            ".coverage",
            ".docusaurus",
            ".env",
            ".eslintcache",
            ".gitmodules",
            ".gradle/y",
            ".hg",
            ".hypothesis",
            ".idea",
            ".mypy_cache",
            ".next",
            ".nox",
            ".npm",
            ".nuxt",
            ".pnpm-store",
            ".project",
            ".pytest_cache",
            ".ruby-gemset",
            ".ruby-version",
            ".ruff_cache",
            ".rvmrc",
            ".sass-cache",
            ".settings",
            ".svn",
            ".swiftpm/y",
            ".tox",
            ".venv",
            ".vs",
            ".vscode",
            ".yarn",
            "Cargo.lock",
            "Gemfile.lock",
            "Pipfile.lock",
            "Thumbs.db",
            "__pycache__/y",
            "bin/y",
            "bower_components",
            "build",
            "bun.lock",
            "bun.lockb",
            "desktop.ini",
            "digest.txt",
            "dist",
            "env",
            "gradle-app.setting",
            "node_modules/y",
            "obj/y",
            "out",
            "package-lock.json",
            "pkg/y",
            "poetry.lock",
            "site-packages",
            "target",
            "vendor/y",
            "vendor/bundle/y",
            "venv",
            "virtualenv",
            "xcuserdata/y",
            "yarn.lock",
            // Near misses.
            "X.PNG",
            "png",
            "log",
            "x.log.txt",
            "x.min.css.txt",
            "environment",
            "outer",
            "builds/y",
            "pnpm-lock.yaml",
            "go.sum",
            "composer.lock",
            ".github/y",
            ".envrc",
            ".gitingestignore",
            "cargo.lock",
            "tfstate",
            "sublime-",
            "x.sublime",
            ".npmrc",
            ".gitkeep",
            "x.pngx/y",
        ] {
            builder = builder.file(format!("{directory}{name}"), "x\n");
        }
    }
    // Files with names that are ignored for directories only.
    for name in [
        "f/bin",
        "f/obj",
        "f/pkg",
        "f/vendor",
        "f/.gradle",
        "f/.bundle",
        "f/.build",
        "f/.swiftpm",
        "f/xcuserdata",
        "f/x.xcodeproj",
        "f/x.xcworkspace",
    ] {
        builder = builder.file(name, "file\n");
    }
    builder.file(".gitattributes", "")
}

/// Lines of the root's `.gitignore`.
fn root_ignore_file() -> Builder {
    files(&[
        "foo", "x/foo", "dirish", "q/dirish", "q/dirish2/z", "a/b", "z/a/b", "spaced", "inner space",
        "#no", "no", "#hash", "!bang", "crlf1", "crlf2", "cr", "bomline", "kept", "ws", "deep/y/kept",
        "one.tmp2", "deep/two.tmp2", "dot/x", "sl/ash", "n/node",
    ])
    .file(
        ".gitignore",
        "\u{feff}bomline\n/foo\ndirish/\nq/dirish2/\na/b\n  spaced \t\ninner space\n\n# no\n#no\n\
         \\#hash\n\\!bang\ncrlf1\r\ncrlf2\r\ncr\r\u{a0}ws\u{3000}\n*.tmp2\n./dot\n//sl//ash\n/\n.\n",
    )
}

/// Ignore files below the root, also in ignored directories, and gitingest's own.
fn nested_ignore_files() -> Builder {
    files(&[
        "sub/a.txt",
        "sub/b.md",
        "sub/d/a.txt",
        "sub/d/name",
        "sub/name",
        "name",
        "a.txt",
        "sub/lead",
        "sub/d/lead",
        "sub/x/y/z",
        "sub/x/y/k",
        "sub/deep/1/t",
        "sub/deep/1/2/t",
        "sub/deep/t",
        "own/p.txt",
        "own/q.txt",
        "own/r/p.txt",
        "node_modules/n/v",
        "w/all/1",
        "w/all/d/2",
        "w/keep",
        "itself/x",
        "top.own",
        "sub/top.own",
        "linked/x",
    ])
    .file("sub/.gitignore", "*.txt\nname\n/lead\nx/y/z\ndeep/**/t\n")
    .file("sub/d/.gitignore", "nothing\n")
    .file("own/.gitingestignore", "p.txt\n")
    .file(".gitingestignore", "*.own\n")
    .file("node_modules/n/.gitignore", "v\n")
    .file("w/all/.gitignore", "**\n")
    .file("itself/.gitignore", "/\n")
    .file("directory/.gitignore/x", "a directory of that name\n")
}

/// Wildcards, classes and escapes, anchored and not.
fn pattern_syntax() -> Builder {
    files(&[
        "star/1/x", "star/2", "dd/1/x", "dd/2", "anyw/t", "x/anyw/t", "mid/b", "mid/1/b", "mid/1/2/b",
        "mid/c", "q1x", "qx", "q/x", "c/a", "c/b", "c/d", "n/a", "n/b", "r/5", "r/x", "br/]", "br/a",
        "br/b", "un[bal", "un", "esc*x", "escAx", "back\\slash", "backslash", "(p)+.$", "pp",
        "s/a/t", "s/b/t", "s/a/b/t", "l.x.y", "l.y", "pre-mid-post", "pre-post", "pre", "neg/ax",
        "neg/bx", "neg/sub/x", "ne/gx", "wide/日", "wide/ab", "t/u/v/w", "t/v/w", "dash/-", "dash/a",
        "dash/b", "posix/a", "posix/:]", "star/deep/3/x", "e/x/f", "e/f", "dir*/g", "dir1/g",
        "many/abc", "many/aXbYc", "tilde~", "sub/tilde~",
    ])
    .file(
        ".gitignore",
        "star/*\ndd/**\n**/anyw\nmid/**/b\nq?x\nc/[ab]\nn/[!a]\nr/[0-9]\nbr/[]a]\nun[bal\nesc\\*x\n\
         back\\\\slash\n(p)+.$\ns/*/t\nl*.y\npre*post\nneg/[!a]x\nne[!q]gx\nwide/?\nt/**/w\ndash/[a-]\n\
         posix/[[:alpha:]]\ne/**/**/f\ndir\\*/g\nmany/a*b*c\n*~\n",
    )
}

/// A root pattern that ignores everything.
fn everything_ignored() -> Builder {
    files(&["a", "b/c", ".d"]).file(".gitignore", "*\n")
}

/// Directories whose names are patterns, with ignore files.
fn wildcard_directories() -> Builder {
    files(&[
        "[ab]/x", "[ab]/y", "a/x", "a/y", "b/x", "c/x", "#c/x", "!d/x", "d/x", "w*/x", "wide/x",
        "b?/z", "b1/z",
    ])
    .file("[ab]/.gitignore", "x\n")
    .file("#c/.gitignore", "x\n")
    .file("w*/.gitignore", "x\n")
    .file("b?/.gitignore", "z\n")
}

/// Around the deepest level that gitingest reads.
fn depth() -> Builder {
    let mut builder = Builder::new().file("top", "top\n");
    for depth in [19, 20, 21, 25] {
        builder = builder.file(format!("{}f{depth}", "d/".repeat(depth)), "deep\n");
        builder = builder.file(format!("{}f", format!("only{depth}/").repeat(depth)), "x\n");
    }
    builder.symlink(format!("{}link", "d/".repeat(20)), "x")
}

/// Text with special tokens, long enough for a `k`.
fn special_tokens() -> Builder {
    Builder::new()
        .file("special", "<|endoftext|> <|endofprompt|> <|im_start|>\n")
        .file("blanks", format!("{}\n\t\t\n   x\n", " ".repeat(300)))
        .file(
            "words",
            "the quick brown fox jumps over the lazy dog, isn't it? ".repeat(100),
        )
        .file("numbers", "1234567890 3.14159 0xdeadbeef\n".repeat(10))
        .file(
            "scripts",
            "Größe, naïve, Ελληνικά, русский, עברית, 日本語, 한국어, 👩‍👩‍👧\n",
        )
}

/// Patterns that include again what others ignore.
fn negations() -> Builder {
    files(&[
        "a.log",
        "keep.log",
        "sub/keep.log",
        "sub/b.log",
        "bin/keep.sh",
        "bin/other.sh",
        "sub/again.log",
        "own/keep.log",
        "late/x",
        "build/x",
        "env",
    ])
    .file(
        ".gitignore",
        "!keep.log\n!bin/\n!sub/again.log\nlate\n!late\n!build/x\n!env\n",
    )
    .file("sub/.gitignore", "again.log\n")
    .file("own/.gitingestignore", "keep.log\n")
}

/// Names that differ only in case.
fn case_twins() -> Builder {
    files(&[
        "README", "readme", "ReadMe", "a", "A", "dir/x", "DIR/x", "Dir/x",
    ])
}

/// Ignore files that make gitingest fail.
fn broken_ignore_files() -> Builder {
    files(&["a.x", "b.y", "sub/c.z", "kept", "trailing\\"])
        .file(".gitignore", "trailing\\\n[z-a]\n*.x\n")
        .file("sub/.gitignore", b"\xff\xfe\n*.z\n")
        .file(".gitingestignore", "*.y\nesc\\/aped\n")
        .symlink("linked/.gitignore", "../../outside")
}

/// Attributes that change what a checkout writes.
fn attributes() -> Builder {
    Builder::new()
        .file(
            ".gitattributes",
            "*.id ident\n*.u16 working-tree-encoding=UTF-16\n",
        )
        .file("a.id", "$Id$\n")
        .file("b.u16", "text\n")
}

/// Names that are not UTF-8.
fn latin_names() -> Builder {
    Builder::new()
        .file(b"caf\xe9.txt", "x\n")
        .file(b"d\xff/y", "y\n")
        .symlink("link", b"x/caf\xe9")
}
