//! The table of routes. One entry says where a handler is served and what `openapi.json` says of it, so that the two can't differ: the
//! router is made by going through the table with [`Served`], the description by going through it with another [`Table`].
//!
//! Nothing of a description gets into the program: [`Served`] drops what describes an operation without calling it.

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodFilter, on};

use super::App;
pub(super) use super::openapi::operation::{Access, CHANGING, Content, Failing, NAMED, Operation, RUNNING};

/// Something that takes every route. Paths are as axum writes them: `{name}` is one segment, `{*name}` all that are left.
pub(super) trait Table: Sized {
    /// Takes one route, for one method or several.
    fn on<H, A>(self, methods: &[Verb], path: &'static str, handler: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static;

    /// Takes a `GET` route; `HEAD` comes with it.
    fn get<H, A>(self, path: &'static str, handler: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        self.on(&[Verb::Get], path, handler, describe)
    }

    /// Takes a `POST` route.
    fn post<H, A>(self, path: &'static str, handler: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        self.on(&[Verb::Post], path, handler, describe)
    }

    /// Takes a `PUT` route.
    fn put<H, A>(self, path: &'static str, handler: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        self.on(&[Verb::Put], path, handler, describe)
    }

    /// Takes a `DELETE` route.
    fn delete<H, A>(self, path: &'static str, handler: H, describe: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        self.on(&[Verb::Delete], path, handler, describe)
    }
}

/// A method of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    Post,
    Put,
    Delete,
    Options,
}

impl Verb {
    fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
            Self::Put => MethodFilter::PUT,
            Self::Delete => MethodFilter::DELETE,
            Self::Options => MethodFilter::OPTIONS,
        }
    }
}

/// The router itself.
pub(super) struct Served(pub(super) Router<App>);

impl Table for Served {
    fn on<H, A>(self, methods: &[Verb], path: &'static str, handler: H, _: impl FnOnce() -> Operation) -> Self
    where
        H: Handler<A, App>,
        A: 'static,
    {
        let mut filters = methods.iter().map(|verb| verb.filter());
        // A route for no method is a route nobody can call.
        let Some(first) = filters.next() else { return self };
        Self(self.0.route(path, on(filters.fold(first, MethodFilter::or), handler)))
    }
}
