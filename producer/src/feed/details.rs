//! What a feed tells of a repository beyond what a job needs, for the catalogue.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Longest description, language, licence or topic that is kept, in characters.
const MAX_TEXT: usize = 500;
/// Most topics that are kept; GitHub allows 20.
const MAX_TOPICS: usize = 50;
/// Longest JSON of fields that are not known here, in bytes. An entry of GitHub's API has 5 KB of
/// addresses of itself, which help nobody who has its address.
const MAX_OTHER: usize = 2048;
/// Fields that say what the catalogue has from elsewhere.
const SAID: [&str; 14] = [
    "owner",
    "org",
    "name",
    "full_name",
    "nameWithOwner",
    "path_with_namespace",
    "url",
    "html_url",
    "http_url_to_repo",
    "web_url",
    "repositoryURL",
    "pushedAt",
    "pushed_at",
    "last_activity_at",
];

/// What a feed tells of a repository. Fields that are absent, or not what they should be, are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Details {
    /// What it is, in its owner's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Its licence: the SPDX identifier if the feed has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// The language that most of it is written in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// Its topics.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub topics: Vec<String>,
    /// Whether it is archived.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archived: Option<bool>,
    /// How many people marked it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stars: Option<u64>,
    /// The feed's other fields, as they are; none of them if they are long.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub feed: Map<String, Value>,
}

impl Details {
    /// Reads an entry of a feed, in the spellings of the scraper, of GitHub's tool and APIs, and of
    /// GitLab's. What cannot be read is left out.
    pub fn of(entry: &str) -> Self {
        let Ok(Value::Object(mut fields)) = serde_json::from_str(entry) else {
            return Self::default();
        };
        let mut first = |names: &[&str]| {
            let mut found = None;
            for name in names {
                let field = fields.remove(*name).filter(|value| !value.is_null());
                found = found.or(field);
            }
            found
        };
        let details = Self {
            description: first(&["description"]).and_then(|value| text(&value)),
            licence: first(&["license", "licenseInfo", "licence"]).and_then(licence),
            language: first(&["language", "primaryLanguage", "languages"]).and_then(named),
            topics: topics(first(&["topics", "repositoryTopics", "tag_list", "tags"])),
            archived: first(&["archived", "isArchived"]).and_then(|value| value.as_bool()),
            stars: first(&[
                "stargazersCount",
                "stargazers_count",
                "stargazerCount",
                "star_count",
                "stars_count",
                "stars",
            ])
            .and_then(|value| value.as_u64()),
            feed: Map::new(),
        };
        for name in SAID {
            fields.remove(name);
        }
        let is_short = serde_json::to_string(&fields).is_ok_and(|json| json.len() <= MAX_OTHER);
        Self {
            feed: if is_short { fields } else { Map::new() },
            ..details
        }
    }
}

fn text(value: &Value) -> Option<String> {
    let text = value.as_str()?.trim();
    (!text.is_empty()).then(|| text.chars().take(MAX_TEXT).collect())
}

/// A text, or the name of an object, or of the first in a list.
fn named(value: Value) -> Option<String> {
    let value = match value {
        Value::Array(values) => values.into_iter().next()?,
        value => value,
    };
    match value {
        Value::Object(fields) => text(fields.get("name")?),
        value => text(&value),
    }
}

fn licence(value: Value) -> Option<String> {
    let Value::Object(fields) = value else {
        return text(&value);
    };
    // GitHub says NOASSERTION of a licence that it does not recognize.
    let names = ["spdxId", "spdx_id", "key", "name"];
    let mut names = names.into_iter().filter_map(|name| text(fields.get(name)?));
    names.find(|name| name != "NOASSERTION")
}

fn topics(value: Option<Value>) -> Vec<String> {
    let Some(Value::Array(values)) = value else {
        return Vec::new();
    };
    let topics = values.into_iter().filter_map(named);
    topics.take(MAX_TOPICS).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_spellings_of_several_feeds_are_read() {
        let scraper = json!({
            "owner": "alphagov", "name": "whitehall", "url": "https://github.com/alphagov/whitehall",
            "description": " Publishing é ", "archived": false, "stargazersCount": 712,
            "license": {"key": "mit", "name": "MIT License", "spdxId": "MIT"},
            "language": "Ruby", "forksCount": 191, "pushedAt": "2026-11-22T10:00:00Z"
        });
        let expected = Details {
            description: Some("Publishing é".to_owned()),
            licence: Some("MIT".to_owned()),
            language: Some("Ruby".to_owned()),
            topics: Vec::new(),
            archived: Some(false),
            stars: Some(712),
            feed: json!({"forksCount": 191}).as_object().unwrap().clone(),
        };
        assert_eq!(Details::of(&scraper.to_string()), expected);

        let tool = json!({
            "description": "Publishing é", "isArchived": false, "stargazerCount": 712,
            "licenseInfo": {"key": "mit", "name": "MIT License"}, "primaryLanguage": {"name": "Ruby"},
            "repositoryTopics": [{"name": "govuk"}, {"name": ""}, 7]
        });
        let of_tool = Details::of(&tool.to_string());
        let topics = vec!["govuk".to_owned()];
        let licence = Some("mit".to_owned());
        let expected = Details {
            licence,
            topics,
            feed: Map::new(),
            ..expected
        };
        assert_eq!(of_tool, expected);
    }

    #[test]
    fn what_is_odd_costs_itself() {
        for entry in ["", "7", "[]", "{", &"[".repeat(10_000)] {
            assert_eq!(Details::of(entry), Details::default(), "{entry:.20}");
        }
        let odd = json!({
            "description": 7, "license": {"spdx_id": "NOASSERTION", "name": "Other"},
            "language": null, "topics": "a", "archived": "yes", "stars": -1
        });
        let expected = Details {
            licence: Some("Other".to_owned()),
            ..Details::default()
        };
        assert_eq!(Details::of(&odd.to_string()), expected);
        let long = json!({"description": "ä".repeat(501), "a": "x".repeat(MAX_OTHER)});
        let expected = Details {
            description: Some("ä".repeat(500)),
            ..Details::default()
        };
        assert_eq!(Details::of(&long.to_string()), expected);
    }

    #[test]
    fn details_are_written_as_they_are_read() {
        let details = Details::of(r#"{"description":"x","topics":["y"],"forks":{"all":1}}"#);
        let json = serde_json::to_string(&details).unwrap();
        assert_eq!(
            json,
            r#"{"description":"x","topics":["y"],"feed":{"forks":{"all":1}}}"#
        );
        assert_eq!(serde_json::from_str::<Details>(&json).unwrap(), details);
    }
}
