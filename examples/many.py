"""Many questions at once, and how much KV each of them held."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

from memento_frontend.native import NativeClient
from memento_frontend.one_call import reason_in_one_call
from memento_frontend.options import Options

from memento_sgl.address import DEFAULT_URL
from memento_sgl.demo.task import sample_problem

client = NativeClient(os.environ.get("MEMENTO_BASE_URL", DEFAULT_URL))
problems = [sample_problem(random.Random(seed)) for seed in range(8)]


def ask(problem):
    return reason_in_one_call(client, problem.question, Options.greedy(max_tokens=2000))


with ThreadPoolExecutor(8) as pool:
    for problem, found in zip(problems, pool.map(ask, problems), strict=True):
        right = "right" if found.answer == problem.answer else "wrong"
        record = found.accounting
        share = record["kv_auc"] / record["kv_auc_without"]
        print(f"{len(found.blocks):>2} blocks  {right}  {share:.0%} of the KV without eviction")
