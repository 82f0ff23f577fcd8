//! A real MCP client (the official Rust SDK's) over streamable HTTP, through the agent.

use std::time::Duration;

use dtma_api::Token;
use rmcp::model::{CallToolRequestParams, ProtocolVersion};
use rmcp::service::RunningService;
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::{ClientLifecycleMode, ClientServiceExt as _, RoleClient};
use serde_json::Value;

use crate::error::{Result, StackError};

const LIMIT: Duration = Duration::from_secs(30);

/// One session with one server.
#[derive(Debug)]
pub struct McpClient {
    service: RunningService<RoleClient, ()>,
}

impl McpClient {
    pub(crate) async fn connect(http: reqwest::Client, url: &str, key: &Token) -> Result<Self> {
        let mut config = StreamableHttpClientTransportConfig::with_uri(url);
        config.auth_header = Some(key.expose().to_owned());
        let transport = StreamableHttpClientTransport::with_client(http, config);
        let lifecycle =
            ClientLifecycleMode::Auto { preferred_versions: vec![ProtocolVersion::V_2026_07_28], legacy_version: None };
        let service = limited("connect", ().serve_with_lifecycle(transport, lifecycle)).await?;
        Ok(Self { service })
    }

    /// Names of the server's tools.
    ///
    /// # Errors
    /// When the server doesn't answer in time, or with an error.
    pub async fn tools(&self) -> Result<Vec<String>> {
        let tools = limited("list tools", self.service.list_all_tools()).await?;
        Ok(tools.into_iter().map(|tool| tool.name.into_owned()).collect())
    }

    /// Calls a tool and gives the text of its answer.
    ///
    /// # Errors
    /// When the server doesn't answer in time, or with an error; the tool's own errors included.
    pub async fn call(&self, tool: &str, arguments: Value) -> Result<String> {
        let mut params = CallToolRequestParams::new(tool.to_owned());
        params.arguments = arguments.as_object().cloned();
        let result = limited("call a tool", self.service.call_tool(params)).await?;
        let texts = result.content.iter().filter_map(|content| content.as_text()).map(|text| text.text.as_str());
        let text = texts.collect::<Vec<_>>().join("\n");
        if result.is_error == Some(true) {
            return Err(StackError::Mcp { doing: "call a tool", problem: text });
        }
        Ok(text)
    }

    /// Ends the session.
    ///
    /// # Errors
    /// When the client's task has failed.
    pub async fn close(self) -> Result<()> {
        limited("close", self.service.cancel()).await.map(drop)
    }
}

async fn limited<T, E: std::fmt::Display>(
    doing: &'static str,
    work: impl Future<Output = std::result::Result<T, E>>,
) -> Result<T> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(StackError::Mcp { doing, problem: error.to_string() }),
        Err(_) => Err(StackError::Mcp { doing, problem: format!("no answer in {} s", LIMIT.as_secs()) }),
    }
}
