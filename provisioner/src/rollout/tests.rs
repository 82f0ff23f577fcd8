use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use dtma_api::EnvironmentId;
use dtma_api::update::{FailedVersion, UpdateOutcome, UpdatePhase, UpdateResult, UpdateState};
use dtma_release::Version;
use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::judge::LEAD;
use super::*;

/// Agents that are remembered, and a clock that is moved by hand.
struct Fleet {
    now: Timestamp,
    seen: HashMap<EnvironmentId, Seen>,
    left_out: HashMap<EnvironmentId, LeftOut>,
    rollout: Rollout,
}

fn id(number: u128) -> EnvironmentId {
    EnvironmentId(Uuid::from_u128(number))
}

fn terms() -> Terms {
    Terms {
        version: Version::new(1, 1, 0),
        waves: vec![1, 10, 50, 100],
        soak_seconds: 600,
        max_failures: 0,
        silent_after_seconds: 180,
        deadline_seconds: 1800,
    }
}

fn result(outcome: UpdateOutcome, to: &str, code: &str, at: Timestamp) -> UpdateResult {
    UpdateResult {
        outcome,
        from_version: "1.0.0".to_owned(),
        to_version: Some(to.to_owned()),
        code: Some(code.to_owned()),
        reason: Some(format!("because of {code}")),
        at,
    }
}

impl Fleet {
    fn of(count: u128, terms: Terms) -> Self {
        let now: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
        let candidates: Vec<Candidate> = (1..=count)
            .map(|number| Candidate { environment: id(number), version: Some("1.0.0".to_owned()), left_out: None })
            .collect();
        let rollout = Rollout::new(RolloutId(Uuid::nil()), terms, &candidates, now);
        let mut fleet = Self { now, seen: HashMap::new(), left_out: HashMap::new(), rollout };
        for number in 1..=count {
            fleet.reports(id(number), "1.0.0", UpdateState::default());
        }
        fleet.later(1);
        fleet
    }

    fn reports(&mut self, environment: EnvironmentId, version: &str, update: UpdateState) {
        let report = Report::new(version, Some(update));
        self.says(environment, report);
    }

    fn says(&mut self, environment: EnvironmentId, report: Report) {
        let seen = Seen {
            enrolled: true,
            reporting: true,
            report: Some(Arc::new(report)),
            reported_at: Some(self.now),
            quiet_since: self.now,
        };
        self.seen.insert(environment, seen);
    }

    /// Everybody but `but` says the same again.
    fn everybody_reports(&mut self, but: &[EnvironmentId]) {
        for (_, seen) in self.seen.iter_mut().filter(|(id, _)| !but.contains(id)) {
            seen.reported_at = Some(self.now);
            seen.quiet_since = self.now;
        }
    }

    fn later(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    /// Steps until nothing changes any more.
    fn settle(&mut self) {
        for _ in 0..20 {
            let Some(step) = self.rollout.step(&self.seen, &self.left_out, self.now) else { return };
            self.rollout.apply(step, self.now);
        }
        panic!("it never comes to rest: {:?}", self.rollout.course);
    }

    /// Those who are told with their next heartbeat.
    fn told(&self) -> BTreeSet<EnvironmentId> {
        let orders = Orders::new(Some(&self.rollout), None, true, &HashMap::new());
        let told = |(id, seen): (&EnvironmentId, &Seen)| {
            orders.for_agent(*id, seen.report.as_ref()?, self.now + LEAD).map(|_| *id)
        };
        self.seen.iter().filter_map(told).collect()
    }

    /// All that are told update, and `minutes` pass with everybody reporting.
    fn update(&mut self, minutes: i64) {
        self.settle();
        for id in self.told() {
            let update = UpdateState {
                last: Some(result(UpdateOutcome::Updated, "1.1.0", "", self.now)),
                ..UpdateState::default()
            };
            self.reports(id, "1.1.0", update);
        }
        self.pass(minutes, &[]);
    }

    fn pass(&mut self, minutes: i64, but: &[EnvironmentId]) {
        for _ in 0..minutes {
            self.settle();
            self.later(60);
            self.everybody_reports(but);
        }
        self.settle();
    }

    fn first(&mut self) -> EnvironmentId {
        self.settle();
        *self.told().first().unwrap()
    }

    fn standing(&self, id: EnvironmentId) -> &Standing {
        &self.rollout.targets[&id].standing
    }

    fn status(&self) -> &'static str {
        self.rollout.course.status.as_str()
    }

    fn reason(&self) -> &str {
        match &self.rollout.course.status {
            Status::Halted { reason, .. } => reason,
            other => panic!("it is {other:?}"),
        }
    }
}

#[test]
fn a_good_version_goes_to_the_fleet_wave_by_wave() {
    let mut fleet = Fleet::of(20, terms());
    for (wave, asked) in [(1, 1), (2, 1), (3, 8), (4, 10)] {
        fleet.settle();
        assert_eq!((fleet.rollout.course.wave, fleet.told().len()), (wave, asked));
        // Nobody else before the wave has proved itself for ten minutes.
        fleet.update(9);
        assert_eq!((fleet.rollout.course.wave, fleet.told().len()), (wave, 0));
        fleet.pass(3, &[]);
    }
    assert_eq!(fleet.status(), "completed");
    assert_eq!(fleet.rollout.counts()["updated"], 20);
}

#[test]
fn one_agent_that_reverts_halts_it_in_its_first_wave_and_the_reason_is_told() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    let update = UpdateState {
        last: Some(result(UpdateOutcome::Reverted, "1.1.0", "crashed", fleet.now)),
        ..UpdateState::default()
    };
    fleet.reports(canary, "1.0.0", update);
    fleet.settle();
    assert_eq!(fleet.reason(), "1 of 1 agents of wave 1 reverted: crashed: because of crashed");
    fleet.pass(100, &[]);
    assert_eq!((fleet.status(), fleet.told().len()), ("halted", 0));
    assert_eq!(fleet.rollout.counts()["waiting"], 19);
    // Somebody has looked at it: on it goes, and that one failure doesn't count any more.
    let step = fleet.rollout.resume(fleet.now).unwrap().unwrap();
    fleet.rollout.apply(step, fleet.now);
    fleet.pass(12, &[]);
    assert_eq!((fleet.rollout.course.wave, fleet.told().len()), (2, 1));
    let second = fleet.first();
    assert_ne!(second, canary);
    let update = UpdateState {
        last: Some(result(UpdateOutcome::Refused, "1.1.0", "expired", fleet.now)),
        ..UpdateState::default()
    };
    fleet.reports(second, "1.0.0", update);
    fleet.settle();
    assert_eq!(fleet.reason(), "1 of 1 agents of wave 2 refused the release: expired: because of expired");
}

#[test]
fn an_agent_that_was_told_and_falls_silent_halts_it_and_one_that_was_silent_before_does_not() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    // Never heard since its wave began: it can't have been told.
    fleet.pass(4, &[canary]);
    assert_eq!((fleet.standing(canary), fleet.status()), (&Standing::Unreached, "running"));
    // Another one is the first to try it in its stead.
    let second = fleet.first();
    fleet.pass(1, &[canary]);
    fleet.pass(4, &[canary, second]);
    assert!(fleet.reason().starts_with("1 of 2 agents of wave 1 fell silent"), "{}", fleet.reason());
    // It is back, and has updated after all. That doesn't make it go on by itself.
    fleet.reports(second, "1.1.0", UpdateState::default());
    fleet.settle();
    assert!(matches!(fleet.standing(second), Standing::Updated { .. }));
    assert_eq!(fleet.status(), "halted");
}

#[test]
fn no_wave_begins_before_somebody_of_the_one_before_runs_the_version() {
    let mut fleet = Fleet::of(20, terms());
    fleet.settle();
    let mut asleep: Vec<EnvironmentId> = fleet.seen.keys().copied().collect();
    for more in 0..3 {
        assert_eq!((fleet.rollout.course.wave, fleet.told().len()), (1, 1), "{more}");
        fleet.pass(4, &asleep);
    }
    let awake = fleet.first();
    asleep.retain(|id| *id != awake);
    fleet.reports(awake, "1.1.0", UpdateState::default());
    fleet.pass(9, &asleep);
    assert_eq!(fleet.rollout.course.wave, 1);
    fleet.pass(3, &asleep);
    assert!(fleet.rollout.course.wave > 1);
    assert!(fleet.rollout.course.history.iter().any(|line| line.message.contains("1 more agent is asked")));
    assert_eq!(fleet.rollout.targets.values().filter(|target| target.wave == 1).count(), 4);
}

#[test]
fn a_fleet_that_sleeps_proves_nothing() {
    let mut fleet = Fleet::of(3, terms());
    fleet.settle();
    let all: Vec<EnvironmentId> = fleet.seen.keys().copied().collect();
    fleet.pass(60, &all);
    assert_eq!((fleet.status(), fleet.rollout.counts()["unreached"]), ("running", 3));
    // The last one asked is the first one heard.
    fleet.everybody_reports(&all[1..]);
    assert_eq!(fleet.first(), all[0]);
    fleet.reports(all[0], "1.1.0", UpdateState::default());
    fleet.pass(12, &all[1..]);
    assert_eq!((fleet.status(), fleet.rollout.counts()["updated"]), ("completed", 1));
}

#[test]
fn failures_that_are_borne_prove_nothing_either() {
    let mut fleet = Fleet::of(20, Terms { max_failures: 9, ..terms() });
    for _ in 0..3 {
        let next = fleet.first();
        let update = UpdateState {
            last: Some(result(UpdateOutcome::Reverted, "1.1.0", "crashed", fleet.now)),
            ..UpdateState::default()
        };
        fleet.reports(next, "1.0.0", update);
        fleet.pass(12, &[]);
        assert_eq!((fleet.status(), fleet.rollout.course.wave, fleet.told().len()), ("running", 1, 1));
    }
}

#[test]
fn silence_within_the_soak_time_counts_and_so_does_going_back() {
    for went_back in [false, true] {
        let mut fleet = Fleet::of(20, terms());
        let canary = fleet.first();
        fleet.update(2);
        assert!(matches!(fleet.standing(canary), Standing::Updated { .. }));
        if went_back {
            fleet.reports(canary, "1.0.0", UpdateState::default());
            fleet.settle();
            assert!(fleet.reason().contains("went_back"), "{}", fleet.reason());
        } else {
            fleet.pass(4, &[canary]);
            assert!(fleet.reason().contains("fell silent"), "{}", fleet.reason());
        }
    }
}

#[test]
fn while_an_agent_goes_back_and_has_not_said_why_there_is_nothing_to_write_down() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    fleet.update(2);
    fleet.reports(canary, "1.0.0", UpdateState { phase: UpdatePhase::Installing, ..UpdateState::default() });
    fleet.settle();
    fleet.later(1);
    assert_eq!(fleet.rollout.step(&fleet.seen, &fleet.left_out, fleet.now), None);
    fleet.reports(canary, "1.0.0", UpdateState::default());
    fleet.settle();
    assert!(fleet.reason().contains("went_back"), "{}", fleet.reason());
}

#[test]
fn a_wave_is_not_over_before_all_of_it_were_heard_again_however_short_its_soak_time_is() {
    let mut fleet = Fleet::of(20, Terms { soak_seconds: 0, ..terms() });
    let canary = fleet.first();
    fleet.reports(canary, "1.1.0", UpdateState::default());
    fleet.settle();
    fleet.later(1);
    fleet.settle();
    assert_eq!(fleet.rollout.course.wave, 1);
    fleet.everybody_reports(&[]);
    fleet.settle();
    assert_eq!(fleet.rollout.course.wave, 2);
}

#[test]
fn what_was_no_judgement_is_waited_out_and_told_again_but_not_for_ever() {
    for (outcome, code, what) in [
        (UpdateOutcome::Failed, "no_space", "could not try it"),
        // A power cut during a trial says nothing of the version.
        (UpdateOutcome::Reverted, "interrupted", "reverted"),
    ] {
        let mut fleet = Fleet::of(20, terms());
        let canary = fleet.first();
        for attempt in 1..=3 {
            assert_eq!(fleet.told(), BTreeSet::from([canary]), "attempt {attempt}");
            let update =
                UpdateState { last: Some(result(outcome, "1.1.0", code, fleet.now)), ..UpdateState::default() };
            fleet.reports(canary, "1.0.0", update);
            fleet.settle();
            assert_eq!(fleet.told().len(), 0, "attempt {attempt}");
            if attempt < 3 {
                assert_eq!(fleet.status(), "running");
                // The same report again is no other attempt.
                fleet.pass(5, &[]);
            }
        }
        assert_eq!(fleet.reason(), format!("1 of 1 agents of wave 1 {what}: {code}: because of {code}"));
    }
}

#[test]
fn a_droplet_from_whose_version_somebody_went_back_is_named_at_once() {
    for (outcome, from, to) in
        [(UpdateOutcome::RolledBack, "1.1.0", "1.0.0"), (UpdateOutcome::UpToDate, "1.0.0", "1.1.0")]
    {
        let mut fleet = Fleet::of(20, terms());
        let canary = fleet.first();
        let last = UpdateResult {
            from_version: from.to_owned(),
            code: None,
            reason: None,
            ..result(outcome, to, "", fleet.now)
        };
        fleet.reports(canary, "1.0.0", UpdateState { last: Some(last), ..UpdateState::default() });
        fleet.settle();
        assert!(fleet.reason().starts_with("1 of 1 agents of wave 1 were rolled back by hand"), "{}", fleet.reason());
    }
}

#[test]
fn what_an_agent_said_before_it_was_asked_is_no_answer() {
    let mut fleet = Fleet::of(1, terms());
    let before = UpdateState {
        last: Some(result(UpdateOutcome::Refused, "1.1.0", "expired", fleet.now)),
        ..UpdateState::default()
    };
    fleet.reports(id(1), "1.0.0", before);
    fleet.later(60);
    fleet.pass(2, &[]);
    assert!(matches!(fleet.standing(id(1)), Standing::Pending { .. }));
    // But a version that has failed there isn't tried again by any agent, so there is nothing to wait for.
    let mut fleet = Fleet::of(1, terms());
    let failed = FailedVersion {
        version: "1.1.0".to_owned(),
        code: "crashed".to_owned(),
        reason: "it ended".to_owned(),
        at: fleet.now,
    };
    fleet.reports(id(1), "1.0.0", UpdateState { failed_versions: vec![failed], ..UpdateState::default() });
    fleet.settle();
    assert!(fleet.reason().ends_with("crashed: it ended"), "{}", fleet.reason());
}

#[test]
fn a_version_on_trial_is_not_taken_for_an_update() {
    let mut fleet = Fleet::of(1, terms());
    let canary = fleet.first();
    for phase in [UpdatePhase::Trial, UpdatePhase::Reverting, UpdatePhase::Unknown] {
        let update = UpdateState { phase, target_version: Some("1.1.0".to_owned()), ..UpdateState::default() };
        fleet.reports(canary, "1.1.0", update);
        fleet.settle();
        assert!(matches!(fleet.standing(canary), Standing::Pending { .. }), "{phase:?}");
    }
    // Halfway for ever is a failure as well.
    fleet.pass(32, &[]);
    assert!(fleet.reason().contains("timed_out"), "{}", fleet.reason());
}

#[test]
fn agents_without_an_updater_are_waited_for_and_then_named() {
    let mut fleet = Fleet::of(3, terms());
    let canary = fleet.first();
    fleet.says(canary, Report::new("0.1.0", None));
    fleet.pass(2, &[]);
    assert_eq!(fleet.status(), "running");
    fleet.pass(3, &[]);
    assert!(fleet.reason().starts_with("1 of 1 agents of wave 1 have no updater: no_updater: agent 0.1.0"));
    // Brought there by hand, it is as good as any.
    fleet.says(canary, Report::new("1.1.0", None));
    fleet.settle();
    assert!(matches!(fleet.standing(canary), Standing::Updated { .. }));
}

#[test]
fn nobody_is_told_a_lower_version_and_whoever_is_ahead_is_done() {
    let mut fleet = Fleet::of(4, Terms { waves: vec![100], ..terms() });
    fleet.reports(id(1), "1.2.0", UpdateState::default());
    fleet.reports(id(2), "1.1.0-rc.1", UpdateState::default());
    fleet.settle();
    assert_eq!(fleet.told(), BTreeSet::from([id(2), id(3), id(4)]));
    assert_eq!(fleet.standing(id(1)), &Standing::Ahead);
    fleet.update(12);
    assert_eq!(fleet.status(), "completed");
    let orders = Orders::new(None, Some(&fleet.rollout), true, &HashMap::new());
    assert_eq!(orders.for_agent(id(1), fleet.seen[&id(1)].report.as_ref().unwrap(), fleet.now), None);
}

#[test]
fn exempted_agents_are_passed_by_and_don_t_stand_in_for_the_first_wave() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    fleet.left_out.insert(canary, LeftOut::Excluded);
    fleet.settle();
    assert_eq!(fleet.standing(canary), &Standing::LeftOut { why: LeftOut::Excluded });
    assert!(!fleet.told().contains(&canary));
    // Exempted no longer, its wave long begun: it is asked again.
    fleet.left_out.clear();
    fleet.settle();
    assert!(fleet.told().contains(&canary));
    let candidates: Vec<Candidate> = (1..=20)
        .map(|number| Candidate {
            environment: id(number),
            version: None,
            left_out: (id(number) == canary).then_some(LeftOut::Pinned),
        })
        .collect();
    let again = Rollout::new(RolloutId(Uuid::nil()), terms(), &candidates, fleet.now);
    assert_eq!(again.targets[&canary].wave, 4);
    assert_eq!(again.targets.values().filter(|target| target.wave == 1).count(), 1);
}

#[test]
fn who_could_not_be_told_for_hours_is_told_and_has_its_time_then() {
    for why in ["left out", "unreached", "down"] {
        let mut fleet = Fleet::of(1, Terms { soak_seconds: 86_400, ..terms() });
        let canary = fleet.first();
        match why {
            "left out" => {
                fleet.left_out.insert(canary, LeftOut::Excluded);
                fleet.pass(120, &[]);
                fleet.left_out.clear();
            }
            "unreached" => {
                fleet.pass(5, &[canary]);
                assert_eq!(fleet.standing(canary), &Standing::Unreached);
                // Nor is it reached because this process has begun anew.
                fleet.later(7200);
                fleet.seen.get_mut(&canary).unwrap().quiet_since = fleet.now;
                fleet.settle();
                assert_eq!(fleet.standing(canary), &Standing::Unreached);
                fleet.reports(canary, "1.0.0", UpdateState::default());
            }
            _ => {
                // Told, and then nobody was there to hear it.
                fleet.later(10);
                fleet.everybody_reports(&[]);
                fleet.settle();
                fleet.later(7200);
                fleet.seen.get_mut(&canary).unwrap().quiet_since = fleet.now;
            }
        }
        fleet.settle();
        assert_eq!((fleet.told(), fleet.status()), (BTreeSet::from([canary]), "running"), "{why}");
        if why == "down" {
            fleet.reports(canary, "1.1.0", UpdateState::default());
            fleet.settle();
            assert!(matches!(fleet.standing(canary), Standing::Updated { .. }));
            continue;
        }
        fleet.pass(29, &[]);
        assert_eq!(fleet.status(), "running", "{why}");
        fleet.pass(3, &[]);
        assert!(fleet.reason().contains("timed_out"), "{why}: {}", fleet.reason());
    }
}

#[test]
fn environments_that_come_are_in_the_last_wave_and_those_that_go_are_not_waited_for() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    fleet.seen.get_mut(&canary).unwrap().enrolled = false;
    fleet.reports(id(99), "1.0.0", UpdateState::default());
    fleet.settle();
    assert_eq!((fleet.standing(canary), fleet.status()), (&Standing::Gone, "running"));
    assert_eq!((fleet.rollout.targets[&id(99)].wave, fleet.standing(id(99))), (4, &Standing::Waiting));
    for _ in 0..4 {
        fleet.update(12);
    }
    assert_eq!(fleet.status(), "completed");
    // Who comes after that is told as well.
    let late = Report::new("1.0.0", None);
    let orders = Orders::new(None, Some(&fleet.rollout), true, &HashMap::new());
    assert_eq!(orders.for_agent(id(100), &late, fleet.now).as_deref(), Some(&Version::new(1, 1, 0)));
}

#[test]
fn paused_nobody_is_told_anything_and_nobody_is_late_and_aborted_it_is_over() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    let step = fleet.rollout.pause(fleet.now).unwrap().unwrap();
    fleet.rollout.apply(step, fleet.now);
    assert_eq!(fleet.rollout.pause(fleet.now), Ok(None));
    fleet.pass(60, &[]);
    assert_eq!((fleet.told().len(), fleet.status()), (0, "paused"));
    let step = fleet.rollout.resume(fleet.now).unwrap().unwrap();
    fleet.rollout.apply(step, fleet.now);
    assert_eq!(fleet.rollout.resume(fleet.now), Ok(None));
    fleet.pass(2, &[]);
    assert_eq!(fleet.told(), BTreeSet::from([canary]));
    let step = fleet.rollout.abort(fleet.now).unwrap().unwrap();
    fleet.rollout.apply(step, fleet.now);
    assert_eq!(fleet.rollout.abort(fleet.now), Ok(None));
    assert_eq!(fleet.rollout.resume(fleet.now), Err(Impossible::Over("aborted")));
    assert_eq!((fleet.told().len(), fleet.rollout.step(&fleet.seen, &fleet.left_out, fleet.now)), (0, None));
}

#[test]
fn a_heartbeat_from_before_its_wave_is_not_answered_with_the_version() {
    let mut fleet = Fleet::of(20, terms());
    let canary = fleet.first();
    let orders = Orders::new(Some(&fleet.rollout), None, true, &HashMap::new());
    let report = Report::new("1.0.0", None);
    // Nor is one that comes while the step is being written down, nor does it count as answered so.
    assert_eq!(orders.for_agent(canary, &report, fleet.now), None);
    fleet.everybody_reports(&[]);
    fleet.pass(4, &[canary]);
    assert_eq!((fleet.standing(canary), fleet.status()), (&Standing::Unreached, "running"));
    let later = fleet.rollout.targets[&canary].asked.as_ref().unwrap().at;
    assert!(orders.for_agent(canary, &report, later).is_some());
}

#[test]
fn a_few_failures_are_borne_where_that_was_said() {
    let mut fleet = Fleet::of(20, Terms { max_failures: 1, waves: vec![50, 100], ..terms() });
    fleet.settle();
    let told: Vec<_> = fleet.told().into_iter().collect();
    let reverted = |fleet: &mut Fleet, id| {
        let update = UpdateState {
            last: Some(result(UpdateOutcome::Reverted, "1.1.0", "no_heartbeat", fleet.now)),
            ..UpdateState::default()
        };
        fleet.reports(id, "1.0.0", update);
        fleet.settle();
    };
    reverted(&mut fleet, told[0]);
    assert_eq!(fleet.status(), "running");
    reverted(&mut fleet, told[1]);
    assert!(fleet.reason().starts_with("2 of 10 agents of wave 1 reverted: no_heartbeat"), "{}", fleet.reason());
}

#[test]
fn a_pin_is_told_whatever_the_fleet_is_told_and_the_excluded_nothing() {
    let fleet = Fleet::of(1, terms());
    let mut completed = fleet.rollout.clone();
    completed.course.status = Status::Completed { at: fleet.now };
    let pin = Preference { pin: Some(Version::new(1, 0, 5)), excluded: false };
    let excluded = Preference { pin: None, excluded: true };
    let preferences = HashMap::from([(id(1), pin), (id(2), excluded), (id(3), Preference::default())]);
    let orders = Orders::new(None, Some(&completed), true, &preferences);
    let told = |number| {
        let report = Report::new("1.0.0", None);
        orders.for_agent(id(number), &report, fleet.now).map(|version| version.to_string())
    };
    assert_eq!([told(1), told(2), told(3)], [Some("1.0.5".to_owned()), None, Some("1.1.0".to_owned())]);
}

#[test]
fn the_first_to_try_one_version_are_others_than_the_first_to_try_the_next() {
    let firsts: BTreeSet<EnvironmentId> = (0..10)
        .map(|minor| Fleet::of(20, Terms { version: Version::new(1, 1 + minor, 0), ..terms() }).first())
        .collect();
    assert!(firsts.len() > 3, "{firsts:?}");
    assert_eq!(Fleet::of(20, terms()).first(), Fleet::of(20, terms()).first());
}
