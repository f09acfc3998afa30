import jax
import numpy as np
from errand_helpers import FOCUS, state_at

from egjax.experience.hindsight import Relabel, gained, hindsight_samples, relabel, rewards
from egjax.experience.prompts import mentions
from egjax.experience.rollouts import replay, replay_all
from egjax.sim.goals import GoalSizes, encode_goal, goal_predicates, satisfied
from egjax.sim.graph import decode
from egjax.sim.text import bind, parse_english, parse_script
from egjax.sim.world import step

STEP, HOLDS = jax.jit(step), jax.jit(satisfied)


def test_gained_is_the_goal_of_the_two_graphs(batches):
    for world, episodes, states in batches:
        for i, episode in enumerate(episodes[:8]):
            first, last = (
                decode(world.scene, state_at(states, i, t), world.names)
                for t in (0, len(episode.steps))
            )
            core = goal_predicates(first, last, close=False)
            # Facts between things other than ON and INSIDE never change but by cutting.
            assert [p for p in core if p.relation != "BETWEEN"] == gained(episode)


def outcome(world, state, plan, predicates):
    """Runs an English plan by names; whether all steps are accepted and the goal holds."""
    for line in plan:
        state, code = STEP(world.scene, state, *bind(world.scene, state, world.names, line))
        if int(code):
            return False, state
    sizes = GoalSizes(8, 64)
    goal = encode_goal(predicates, world.names, nodes=len(world.classes), sizes=sizes)
    return True, bool(np.asarray(HOLDS(world.scene, state, goal)).all())


def test_english_plans_reach_their_goals_and_no_step_can_go(batches):
    plans = 0
    for world, episodes, states in batches:
        # From the start only, where the test knows the state.
        found = relabel(world, episodes, states, seed=5, config=Relabel(later=0.0, whole=0.0))
        assert len(found) > len(episodes) // 3
        for episode, predicates in found[:10]:
            plan = parse_english(episode.english())
            assert outcome(world, world.state, plan, predicates) == (True, True)
            assert not set(predicates) - set(gained(episode))
            for t in range(len(plan)):
                shorter = plan[:t] + plan[t + 1 :]
                assert outcome(world, world.state, shorter, predicates)[1] is not True
            plans += 1
    assert plans > 10


def test_scripts_played_together_are_those_played_one_by_one(batches):
    world, episodes, _ = batches[0]
    scripts = [[done.line for done in episode.steps] for episode in episodes[:3]]
    # Nobody sleeps on their feet: refused, and nothing comes after it.
    scripts[1][2:2] = [parse_script("[SLEEP]")[0]]
    assert len(scripts[0]) > 8
    found, states = replay_all(world, scripts, length=8, batch=4)
    assert states.nodes.shape[:2] == (4, 9)
    for episode, script, upto in zip(found, scripts, (8, 2, 8), strict=True):
        alone, along = replay(world, script[:upto])
        assert episode == alone
    np.testing.assert_array_equal(states.nodes[2], along.nodes)


def test_rewards_in_hindsight_are_paid_when_a_goal_first_holds(batches):
    world, episodes, states = batches[0]
    found = relabel(world, episodes, states, seed=5, config=Relabel(later=0.0, whole=0.0))
    for episode, predicates in found[:6]:
        paid = rewards(episode, predicates, gain=2.0, cost=-0.1)
        sizes = GoalSizes(8, 64)
        goal = encode_goal(predicates, world.names, nodes=len(world.classes), sizes=sizes)
        state, before = world.state, np.asarray(HOLDS(world.scene, world.state, goal))
        assert not before[np.asarray(goal.mask)].any()
        for line, reward in zip(parse_english(episode.english()), paid, strict=True):
            state, _ = STEP(world.scene, state, *bind(world.scene, state, world.names, line))
            held = before | np.asarray(HOLDS(world.scene, state, goal))
            new = int((held & ~before).sum())
            assert reward == (2.0 * new if new else -0.1)
            before = held
        assert sum(r > 0 for r in paid) > 0


def test_widened_goals_are_everything_that_the_plan_brings(batches):
    world, episodes, states = batches[0]
    config = Relabel(whole=1.0, whole_goals=99, later=0.5)
    for episode, predicates in relabel(world, episodes, states, seed=1, config=config):
        assert predicates == gained(episode)


def test_samples_are_deterministic_distinct_and_name_no_unseen_activity(worlds):
    def samples(seed, **more):
        return list(hindsight_samples(worlds, 64, seed=seed, focus=FOCUS, batch=32, **more))

    first = samples(3)
    assert first == samples(3) != samples(4)
    assert len({(s.prompt, s.completion) for s in first}) == len(first) > 30
    assert all(s.prompt.startswith("Q: How to do this?") for s in first)
    # A plan that reads like an activity's name must go when that activity is held out.
    some = next(s.completion.split(". ")[1].rstrip(".") for s in first if ". " in s.completion)
    assert any(mentions(s.completion, [some]) for s in first)
    assert not any(mentions(s.prompt + s.completion, [some]) for s in samples(3, unseen=[some]))
