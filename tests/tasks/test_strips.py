from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from benchmark_rows import rows_of
from satune.tasks import blocks, logistics
from satune.tasks.blocksworld import Blocksworld
from satune.tasks.planbench import BLOCKS, LOGISTICS
from satune.tasks.strips import (
    Grounder,
    PddlError,
    parse_domain,
    parse_plan,
    parse_problem,
)

TYPED = """
; a courier who walks between places, and a van that is a vehicle
(define (domain courier)
  (:requirements :strips :typing :negative-preconditions)
  (:types vehicle place - object van - vehicle)
  (:constants depot - place)
  (:predicates (at ?v - vehicle ?p - place) (broken ?v - vehicle))
  (:action drive :parameters (?v - vehicle ?from ?to - place)
    :precondition (and (at ?v ?from) (not (broken ?v)))
    :effect (and (not (at ?v ?from)) (at ?v ?to)))
  (:action rest :parameters () :effect (and))
  (:action crash :parameters (?v - vehicle) :precondition () :effect (broken ?v)))
"""
PROBLEM = """
(define (problem p) (:domain courier)
  (:objects one - VAN home - place thing)
  (:init (at one home))
  (:goal (and (at one depot) (not (broken one)))))
"""


def courier(plan):
    return Grounder(parse_domain(TYPED), parse_problem(PROBLEM)).execute(parse_plan(plan))


@pytest.mark.parametrize(
    ("plan", "valid", "executed", "share", "detail"),
    [
        # The goal has two literals; "not broken" holds from the start.
        ("(drive one home depot)", True, 1, 1.0, "reaches the goal"),
        ("(REST)(Drive one HOME depot)", True, 2, 1.0, "reaches the goal"),
        ("", False, 0, 0.5, "the goal fails: at one depot"),
        (
            "(drive one depot home)",
            False,
            0,
            0.5,
            "action 1 cannot be executed: .*not at one depot",
        ),
        ("(rest)(crash one)(drive one home depot)", False, 2, 0.0, "action 3 .*: broken one"),
        ("(drive one home depot)(crash one)", False, 2, 0.5, "the goal fails"),
        ("(drive thing home depot)", False, 0, 0.5, "thing is no vehicle"),
        ("(drive one one depot)", False, 0, 0.5, "one is no place"),
        ("(drive two home depot)", False, 0, 0.5, "there is no object 'two'"),
        ("(drive one home)", False, 0, 0.5, "drive takes 3 objects, not 2"),
        ("(fly one home depot)", False, 0, 0.5, "there is no action 'fly'"),
        # From home to home: the delete comes before the add.
        ("(drive one home home)(drive one home depot)", True, 2, 1.0, "reaches the goal"),
    ],
)
def test_execution(plan, valid, executed, share, detail):
    done = courier(plan)
    assert (done.valid, done.executed, done.goal_share) == (valid, executed, share)
    assert re.search(detail, done.detail)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not one .define .domain"),
        ("(define (domain d)", "closing parenthesis is missing"),
        ("(define (domain d)))", "closing parenthesis too many"),
        ("(define (problem d))", "does not start with"),
        ("(define (domain d) (:requirements :adl))", "requirement :adl is not supported"),
        ("(define (domain d) (:functions (f)))", "section :functions"),
        ("(define (domain d) (:action a :parameters (?x) :duration 3))", ":duration is not"),
        ("(define (domain d) (:action a :effect (when (p) (q))))", "when is not supported"),
        ("(define (domain d) (:action a :precondition (or (p) (q))))", "or is not supported"),
        ("(define (domain d) (:action a :parameters (?x - (either b c))))", "either is not"),
        ("(define (domain d) (:action))", "needs a name"),
        ("(" * 10**5, "nested too deep"),
    ],
)
def test_what_is_not_known_is_refused(text, message):
    with pytest.raises(PddlError, match=message):
        parse_domain(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(define (problem p) (:init))", "needs one :goal"),
        ("(define (problem p) (:init (= (cost) 3)) (:goal (p)))", "not an atom|= is not"),
        ("(define (problem p) (:init) (:goal (forall (?x) (p ?x))))", "not an atom|forall"),
        ("(define (problem p) (:metric minimize x) (:goal (p)))", "section :metric"),
    ],
)
def test_problems_that_are_refused(text, message):
    with pytest.raises(PddlError, match=message):
        parse_problem(text)


def instances():
    """(words, domain, problem, reference plan) of ten real rows of each domain, or generated
    Blocksworld ones where the rows are absent."""
    for words, name in ((BLOCKS, "planbench_bw_nl"), (LOGISTICS, "planbench_logistics")):
        lines = rows_of(name).read_text().splitlines()
        for line in lines[:: len(lines) // 10][:10]:
            row = json.loads(line)
            gold = parse_plan(row["ground_truth_plan_pddl"])
            yield words, row["domain_pddl"], row["problem_pddl"], gold


def damaged(plan, rng):
    """The plan cut, with two actions exchanged, with one repeated, and with an object replaced."""
    at = rng.randrange(len(plan) - 1)
    swapped = [*plan[:at], plan[at + 1], plan[at], *plan[at + 2 :]]
    repeated = [*plan[:at], plan[at], *plan[at:]]
    others = sorted({name for step in plan for name in step[1:]} - set(plan[at][1:]))
    changed = [*plan]
    if others:
        changed[at] = (*plan[at][:-1], rng.choice(others))
    return [plan[:-1], swapped, repeated, changed]


@pytest.mark.slow
def test_verdicts_are_those_of_unified_planning():
    pytest.importorskip("unified_planning")
    from unified_planning.engines import SequentialPlanValidator
    from unified_planning.engines.results import ValidationResultStatus
    from unified_planning.io import PDDLReader

    rng = random.Random(3)
    verdicts = []
    for words, domain, problem, gold in instances():
        reader = PDDLReader()
        theirs = reader.parse_problem_string(domain, problem)
        ours = Grounder(words.domain, parse_problem(problem))
        rows_own = Grounder(parse_domain(domain), parse_problem(problem))
        for plan in [gold, *damaged(gold, rng)]:
            written = "\n".join(f"({' '.join(step)})" for step in plan)
            read = reader.parse_plan_string(theirs, written)
            with SequentialPlanValidator() as validator:
                status = validator.validate(theirs, read).status
            verdict = ours.execute(plan).valid
            assert verdict == rows_own.execute(plan).valid, written
            assert verdict == (status is ValidationResultStatus.VALID), written
            verdicts.append(verdict)
    assert len(verdicts) >= 55
    assert 20 <= sum(verdicts) <= len(verdicts) - 40  # both kinds are there


def test_the_built_in_domains_are_the_benchmarks():
    for module, name in ((blocks, "planbench_bw_nl"), (logistics, "planbench_logistics")):
        texts = {json.loads(line)["domain_pddl"] for line in rows_of(name).open()}
        for text in texts:
            given = parse_domain(text).actions
            assert given.keys() == module.DOMAIN.actions.keys()
            for action in given.values():
                assert action.meaning() == module.DOMAIN.actions[action.name].meaning()


def test_an_action_refused_leaves_the_state_alone():
    problem = next(itertools.islice(Blocksworld().problems("train"), 1))
    ground = Grounder(BLOCKS.domain, parse_problem(problem.metadata["problem_pddl"]))
    state = set(ground.instance.init)
    assert ground.apply(state, ("put-down", "a")) and state == ground.instance.init
