//! `secrets`, `secretsFrom`, `secretsAs` and `requiredOAuthProviders`: names and sources for the spec, and the values apart from it.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::findings::{At, Findings};
use crate::instance::secrets::{Provider, SecretForm, SecretName, SecretSources, SecretValues};
use crate::instance::spec::Environment;

pub(super) const KEYS: [&str; 4] = ["secrets", "secretsFrom", "secretsAs", "requiredOAuthProviders"];

/// Most secrets, and most providers, of one instance.
const MOST: usize = 128;

/// What a deploy says of its secrets. What is wrong with it goes to `findings`, and never repeats a value.
pub(super) fn read(
    body: &Map<String, Value>,
    environment: &Environment,
    findings: &mut Findings,
) -> (SecretSources, SecretValues) {
    let root = At::root();
    let values = given(body, findings);
    let providers = providers(body, findings);
    let from_backend = match findings.text(body.get("secretsFrom"), &root.key("secretsFrom")).as_deref() {
        None | Some("") => false,
        Some("backend") => true,
        Some(_) => {
            findings.fault(&root.key("secretsFrom"), "must be \"backend\", or absent");
            false
        }
    };
    let form = match findings.text(body.get("secretsAs"), &root.key("secretsAs")).as_deref() {
        None | Some("" | "files") => SecretForm::Files,
        Some("environment") => SecretForm::Environment,
        Some(_) => {
            findings.fault(&root.key("secretsAs"), "must be files or environment");
            SecretForm::Files
        }
    };
    let mut sources = SecretSources { given: values.0.keys().cloned().collect(), from_backend, providers, form };
    let of_providers: BTreeSet<SecretName> = sources.providers.iter().flat_map(Provider::names).collect();
    for name in sources.given.intersection(&of_providers) {
        let problem = "is the name of an access token of requiredOAuthProviders as well";
        findings.fault(&root.key("secrets").key(name.as_str()), problem);
    }
    if form == SecretForm::Environment {
        for name in sources.promised().iter().filter(|name| environment.0.contains_key(name.as_str())) {
            let problem = format!("has {name}, which is an environment variable of this deploy as well");
            findings.fault(&root.key("secrets"), problem);
        }
    }
    if sources.is_none() {
        // Nothing to give in whatever form.
        sources.form = SecretForm::default();
        if form != SecretForm::default() {
            findings.warn(&root.key("secretsAs"), "is ignored where there are no secrets");
        }
    }
    (sources, values)
}

fn given(body: &Map<String, Value>, findings: &mut Findings) -> SecretValues {
    let at = At::root().key("secrets");
    let mut values = SecretValues::default();
    let members = findings.map(body.get("secrets"), &at);
    if members.len() > MOST {
        findings.fault(&at, format!("has more than {MOST} members"));
        return values;
    }
    for (at, name, value) in members {
        let name = match name.parse::<SecretName>() {
            Ok(name) => Some(name),
            Err(error) => {
                findings.fault(&at, format!("has a name that isn't one: it {error}"));
                None
            }
        };
        match (value.as_str(), value.as_str().and_then(SecretValues::problem), name) {
            (None, _, _) => findings.fault(&at, "must be a text"),
            (Some(_), Some(problem), _) => findings.fault(&at, problem),
            (Some(value), None, Some(name)) => drop(values.0.insert(name, value.to_owned().into())),
            (Some(_), None, None) => {}
        }
    }
    values
}

fn providers(body: &Map<String, Value>, findings: &mut Findings) -> BTreeSet<Provider> {
    let at = At::root().key("requiredOAuthProviders");
    let listed = findings.list(body.get("requiredOAuthProviders"), &at);
    if listed.len() > MOST {
        findings.fault(&at, format!("has more than {MOST} elements"));
        return BTreeSet::new();
    }
    let mut providers = BTreeSet::new();
    for (at, value) in listed {
        match value.as_str().map(|text| Provider::try_from(text.to_owned())) {
            Some(Ok(provider)) => drop(providers.insert(provider)),
            Some(Err(error)) => findings.fault(&at, error.to_string()),
            None => findings.fault(&at, "must be a text"),
        }
    }
    providers
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Policy, confidential, validate};
    use super::*;

    fn body(more: Value) -> Value {
        let mut body =
            json!({ "dockerImageUrl": "busybox", "instanceNameOnToolbox": "one", "accountToolInstanceId": "id" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    #[test]
    fn a_spec_has_names_and_sources_and_the_values_come_apart_from_it() {
        let asked = body(json!({
            "secrets": { "API_KEY": "hunter2" },
            "secretsFrom": "backend",
            "secretsAs": "environment",
            "requiredOAuthProviders": ["github"],
        }));
        let (spec, warnings) = validate(&asked, &Policy::default()).unwrap();
        assert_eq!(warnings, []);
        let promised: Vec<String> = spec.secrets.promised().into_iter().map(String::from).collect();
        assert_eq!(promised, ["API_KEY", "GITHUB_PERSONAL_ACCESS_TOKEN", "GITHUB_TOKEN", "OAUTH_GITHUB_ACCESS_TOKEN"]);
        assert!(spec.secrets.from_backend && spec.secrets.form == SecretForm::Environment);
        let written = serde_json::to_string(&spec).unwrap() + &format!("{spec:?}");
        assert!(!written.contains("hunter2"), "{written}");
        assert_eq!(confidential(&asked).secrets.expose(&"API_KEY".parse().unwrap()), Some("hunter2"));

        // Other values make no other spec; other names do.
        let other_value = body(json!({
            "secrets": { "API_KEY": "other" }, "secretsFrom": "backend", "secretsAs": "environment",
            "requiredOAuthProviders": ["github"],
        }));
        assert_eq!(validate(&other_value, &Policy::default()).unwrap().0, spec);
        let plain = validate(&body(json!({})), &Policy::default()).unwrap().0;
        assert!(!serde_json::to_string(&plain).unwrap().contains("secrets"), "older specs keep their hash");
    }

    #[test]
    fn every_fault_is_named_at_once_and_no_value_is_repeated() {
        let asked = body(json!({
            "secrets": { "1BAD": "hunter2", "NUMBER": 7, "EMPTY": "", "NUL": "hunter2\0", "GITHUB_TOKEN": "hunter2", "PLAIN": "hunter2" },
            "secretsFrom": "hunter2",
            "secretsAs": "environment",
            "requiredOAuthProviders": ["github", "Bad", 7],
            "environmentVariables": { "PLAIN": "x" },
        }));
        let refusal = validate(&asked, &Policy::default()).unwrap_err();
        let paths: BTreeSet<&str> = refusal.faults.iter().map(|fault| fault.path.as_str()).collect();
        let all = [
            "$.requiredOAuthProviders[1]",
            "$.requiredOAuthProviders[2]",
            "$.secrets",
            "$.secrets.1BAD",
            "$.secrets.EMPTY",
            "$.secrets.GITHUB_TOKEN",
            "$.secrets.NUL",
            "$.secrets.NUMBER",
            "$.secretsFrom",
        ];
        assert_eq!(paths, all.into());
        assert!(!format!("{refusal:?}").contains("hunter2"), "{refusal:?}");
        for (key, bad) in
            [("secrets", json!(7)), ("secretsAs", json!("hunter2")), ("requiredOAuthProviders", json!("x"))]
        {
            let refusal = validate(&body(json!({ key: bad })), &Policy::default()).unwrap_err();
            assert_eq!(refusal.faults[0].path, format!("$.{key}"));
        }
    }
}
