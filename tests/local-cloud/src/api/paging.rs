//! Lists in pages.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use serde_json::{Map, Value, json};

use super::ApiError;

const PER_PAGE: usize = 20;
const PER_PAGE_MAX: usize = 200;

/// Query of a list, and where its other pages are.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    page: usize,
    per_page: usize,
    origin: String,
    path: String,
    query: Vec<(String, String)>,
}

/// Beginning of every link: the cloud as the caller calls it.
pub(super) fn origin(headers: &HeaderMap) -> String {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    format!("http://{host}")
}

impl<S: Send + Sync> FromRequestParts<S> for Listing {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let text = parts.uri.query().unwrap_or_default();
        let query: Vec<(String, String)> = form_urlencoded::parse(text.as_bytes())
            .map(|(key, value)| (key.into_owned(), value.into_owned()))
            .collect();
        let number = |name: &str, otherwise: usize, most: usize| {
            let Some((_, value)) = query.iter().find(|(key, _)| key == name) else { return Ok(otherwise) };
            let number = value.parse().ok().filter(|number| (1..=most).contains(number));
            number.ok_or_else(|| ApiError::BadRequest(format!("{name} must be a number from 1 to {most}")))
        };
        Ok(Self {
            page: number("page", 1, usize::MAX)?,
            per_page: number("per_page", PER_PAGE, PER_PAGE_MAX)?,
            origin: origin(&parts.headers),
            path: parts.uri.path().to_owned(),
            query,
        })
    }
}

impl Listing {
    /// Value of a query parameter.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The page asked for, under `key`, with `links.pages` and `meta.total`.
    pub(super) fn show(&self, key: &str, items: Vec<Value>) -> Value {
        let total = items.len();
        let pages = total.div_ceil(self.per_page).max(1);
        let shown: Vec<Value> =
            items.into_iter().skip(self.per_page.saturating_mul(self.page - 1)).take(self.per_page).collect();
        let mut links = Map::new();
        if self.page > 1 {
            links.insert("first".into(), self.link(1));
            links.insert("prev".into(), self.link(self.page - 1));
        }
        if self.page < pages {
            links.insert("next".into(), self.link(self.page + 1));
            links.insert("last".into(), self.link(pages));
        }
        let links = if links.is_empty() { json!({}) } else { json!({ "pages": links }) };
        json!({ key: shown, "links": links, "meta": { "total": total } })
    }

    fn link(&self, page: usize) -> Value {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(self.query.iter().filter(|(key, _)| key != "page"));
        query.append_pair("page", &page.to_string());
        format!("{}{}?{}", self.origin, self.path, query.finish()).into()
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    async fn listing(uri: &str) -> Result<Listing, ApiError> {
        let (mut parts, ()) = Request::get(uri).header("host", "cloud:1").body(()).unwrap().into_parts();
        Listing::from_request_parts(&mut parts, &()).await
    }

    #[tokio::test]
    async fn a_page_in_the_middle_links_to_all_its_neighbours_and_keeps_the_filter() {
        let listing = listing("/v2/droplets?tag_name=a%3Ab&per_page=2&page=2").await.unwrap();
        let shown = listing.show("droplets", (0..5).map(Value::from).collect());
        assert_eq!(shown["droplets"], json!([2, 3]));
        assert_eq!(shown["meta"], json!({"total": 5}));
        let link = |page| format!("http://cloud:1/v2/droplets?tag_name=a%3Ab&per_page=2&page={page}");
        assert_eq!(
            shown["links"]["pages"],
            json!({"first": link(1), "prev": link(1), "next": link(3), "last": link(3)})
        );
    }

    #[tokio::test]
    async fn a_single_page_has_no_links_and_one_beyond_the_end_is_empty() {
        let one = listing("/v2/tags").await.unwrap().show("tags", vec![json!(1)]);
        assert_eq!(one, json!({"tags": [1], "links": {}, "meta": {"total": 1}}));
        let beyond = listing("/v2/tags?page=9").await.unwrap().show("tags", vec![json!(1)]);
        assert_eq!(beyond["tags"], json!([]));
    }

    #[tokio::test]
    async fn a_page_that_cannot_be_is_refused() {
        for query in ["page=0", "per_page=201", "per_page=x"] {
            assert!(matches!(listing(&format!("/v2/tags?{query}")).await, Err(ApiError::BadRequest(_))), "{query}");
        }
    }
}
