//! Specs and templates in the wire's words. Values of environment variables stay behind: callers are told not to put secrets there, and do.

use dtma_api::instance::{Egress as EgressView, SecretsAs, Transport, VolumeRequest};
use dtma_api::template::{LimitsView, SandboxView, TemplateKind, TemplateView};
use dtma_api::validation::{HealthCheckView, McpView, PublishedPort, SecretsView, SpecView};

use super::health::HealthCheck;
use super::network::Egress;
use super::secrets::{SecretForm, SecretSources};
use super::spec::{HostPort, Limits, McpServer, RestartPolicy, Sandbox, Spec};
use super::template::{Defaults, Template};

impl Spec {
    /// The spec for callers.
    pub fn view(&self) -> SpecView {
        // Named one by one, so that nothing is added to a spec without a thought for what callers are shown.
        let Self {
            name,
            account_tool_instance_id,
            image,
            pull_policy,
            process,
            labels,
            ports,
            publish_on,
            volumes,
            limits,
            restart,
            sandbox,
            network,
            group,
            secrets,
            mcp,
            health_check,
        } = self;
        let ports = ports.iter().map(|port| PublishedPort {
            ip: publish_on.to_string(),
            private_port: port.container,
            public_port: match port.host {
                HostPort::Exactly(number) => Some(number),
                HostPort::Any => None,
            },
            protocol: port.protocol.as_str().to_owned(),
        });
        let volume = |volume: &super::Volume| VolumeRequest { name: volume.name.clone(), path: volume.path.clone() };
        SpecView {
            instance_name_on_toolbox: name.clone(),
            account_tool_instance_id: account_tool_instance_id.clone(),
            image: image.to_string(),
            pull_policy: *pull_policy,
            mcp: mcp.as_ref().map(mcp_view),
            health_check: mcp.as_ref().map(|_| health_check_view(*health_check)),
            environment_variables: process.environment.0.keys().cloned().collect(),
            entrypoint: process.entrypoint.clone(),
            command: process.command.clone(),
            working_dir: process.working_dir.clone(),
            user: process.user.clone(),
            labels: labels.clone(),
            ports: ports.collect(),
            volumes: volumes.iter().map(volume).collect(),
            limits: limits_view(*limits),
            restart_policy: match restart {
                RestartPolicy::UnlessStopped => "unless-stopped".to_owned(),
                RestartPolicy::OnFailure { max_retries: 0 } => "on-failure".to_owned(),
                RestartPolicy::OnFailure { max_retries } => format!("on-failure:{max_retries}"),
                RestartPolicy::Never => "no".to_owned(),
            },
            sandbox: sandbox_view(sandbox),
            group_id: group.clone(),
            egress: egress_view(&network.egress),
            secrets: Some(secrets).filter(|secrets| !secrets.is_none()).map(secrets_view),
        }
    }
}

fn mcp_view(mcp: &McpServer) -> McpView {
    let (mode, most) = mcp.sessions.shown();
    McpView {
        transport: mcp.transport,
        port: mcp.port,
        path: mcp.path.clone(),
        session_mode: (mcp.transport == Transport::Stdio).then_some(mode),
        max_sessions: most,
    }
}

fn secrets_view(secrets: &SecretSources) -> SecretsView {
    SecretsView {
        names: secrets.promised().into_iter().map(String::from).collect(),
        from_backend: secrets.from_backend,
        providers: secrets.providers.iter().map(ToString::to_string).collect(),
        given_as: match secrets.form {
            SecretForm::Files => SecretsAs::Files,
            SecretForm::Environment => SecretsAs::Environment,
        },
    }
}

impl Template {
    /// The template for callers.
    pub fn view(self) -> TemplateView {
        let mut defaults = Defaults::default();
        self.apply(&mut defaults);
        let Defaults { limits, sandbox, egress } = defaults;
        let kind = self.kind();
        TemplateView {
            name: self.name().to_owned(),
            kind,
            description: self.purpose().to_owned(),
            limits: (kind == TemplateKind::Resources).then(|| limits_view(limits)),
            sandbox: (kind == TemplateKind::Hardening).then(|| sandbox_view(&sandbox)),
            egress: (kind == TemplateKind::Hardening).then(|| egress_view(&egress)),
        }
    }
}

#[allow(clippy::cast_precision_loss)] // billionths of at most a thousand cores
fn limits_view(limits: Limits) -> LimitsView {
    LimitsView { memory_bytes: limits.memory_bytes, cpu: limits.nano_cpus as f64 / 1e9, pids: limits.pids }
}

fn health_check_view(check: HealthCheck) -> HealthCheckView {
    HealthCheckView {
        enabled: check.enabled,
        interval_seconds: check.interval_seconds,
        timeout_seconds: check.timeout_seconds,
        failure_threshold: check.failure_threshold,
        success_threshold: check.success_threshold,
        start_period_seconds: check.start_period_seconds,
        restart: check.restart,
    }
}

fn sandbox_view(sandbox: &Sandbox) -> SandboxView {
    SandboxView {
        read_only_root: sandbox.read_only_root,
        tmpfs: sandbox.tmpfs.clone(),
        capabilities: sandbox.capabilities.iter().map(|capability| capability.as_str().to_owned()).collect(),
        shm_bytes: sandbox.shm_bytes,
    }
}

fn egress_view(egress: &Egress) -> EgressView {
    match egress {
        Egress::Open => EgressView::Open,
        Egress::None => EgressView::None,
        Egress::AllowList(list) => EgressView::Allow(list.iter().map(ToString::to_string).collect()),
    }
}
