"""The queue between driver and workers, without Ray: errors and results of several groups, pauses and stops."""

import asyncio

from eclectus.tasks.training.workers import STOPPED, JobQueue

ERROR = ("RuntimeError", "Connection closed by peer", "traceback")


def in_queue(scenario):
    """Runs the scenario with a queue that has a job, number 1."""

    async def run():
        queue = JobQueue()
        await queue.post("module:function", {})
        return await scenario(queue)

    return asyncio.run(run())


async def is_waiting(awaitable):
    task = asyncio.ensure_future(awaitable)
    done, _ = await asyncio.wait([task], timeout=0.05)
    return task, not done


def test_survivors_of_one_group_may_all_report_the_same_broken_connection():
    async def scenario(queue):
        await queue.fail(1, "first group", ERROR)
        await queue.fail(1, "first group", ERROR)
        return await queue.take(0), (await queue.poll())[2]

    job, error = in_queue(scenario)
    assert job["number"] == 1 and error is None


def test_an_error_that_a_second_group_raises_at_the_same_step_ends_the_job_and_at_another_does_not():
    async def scenario(queue):
        await queue.report("progress", {"done": 7})
        await queue.fail(1, "first group", ERROR)
        await queue.report("progress", {"done": 9})
        await queue.fail(1, "second group", ERROR)
        other = (await queue.poll())[2]
        await queue.fail(1, "third group", ERROR)
        return other, (await queue.poll())[2]

    other, same = in_queue(scenario)
    assert other is None and same == ERROR


def test_results_of_a_group_that_was_replaced_do_not_count():
    async def scenario(queue):
        for rank in (0, 1, 2):
            await queue.finish(1, "four", rank, 4, "old")
        await queue.finish(1, "two", 0, 2, "new")
        half = (await queue.poll())[1]
        await queue.finish(1, "two", 1, 2, None)
        results = (await queue.poll())[1]
        await queue.post("module:function", {})
        await queue.finish(2, "two", 0, 2, "second")
        await queue.finish(2, "two", 1, 2, None)
        return half, results, (await queue.poll())[1]

    half, results, second = in_queue(scenario)
    assert half is None and results[0] == "new" and second[0] == "second"


def test_a_paused_job_is_taken_by_the_next_group_only():
    async def scenario(queue):
        watch, _ = await is_waiting(queue.wait_for_stop())
        assert not await queue.pause() and await watch is True
        assert await queue.stopped(1, "stopped at training step 3") is True
        assert await queue.pause() and (await queue.poll())[2] is None
        # The worker that has stopped asks for the job after it; one of a group that starts too early waits.
        old, waits = await is_waiting(queue.take(1))
        new, waits_too = await is_waiting(queue.take(0))
        assert waits and waits_too
        await queue.go_on()
        job = await new
        assert not old.done()
        old.cancel()
        return job

    assert in_queue(scenario)["number"] == 1


def test_between_jobs_workers_can_be_replaced_at_once():
    async def scenario(queue):
        await queue.finish(1, "one", 0, 1, None)
        return await queue.pause()

    assert in_queue(scenario)


def test_only_a_job_that_trains_is_asked_for_a_checkpoint_and_ends_with_it():
    async def scenario(queue):
        before = await queue.ask_to_stop()
        await queue.report("progress", {"done": 3})
        after = await queue.ask_to_stop()
        goes_on = await queue.stopped(1, "stopped at training step 3")
        return before, after, goes_on, (await queue.poll())[2]

    assert in_queue(scenario) == (False, True, False, (STOPPED, "stopped at training step 3", ""))
