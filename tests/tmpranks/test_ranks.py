import pytest
def both(word):
    import torch.distributed as dist, os
    dist.init_process_group("gloo")
    import torch
    x=torch.ones(1)*dist.get_rank(); dist.all_reduce(x); print(word, x.item()); dist.destroy_process_group()
def bad():
    import os,time
    if os.environ["RANK"]=="1": raise ValueError("rank one broke")
    time.sleep(60)
def test_ok(run_ranks): assert run_ranks(both,2,"hi")==["hi 1.0\n"]*2
def test_bad(run_ranks): run_ranks(bad,2)
def test_timeout(run_ranks): run_ranks(bad,1,timeout=2)
def test_shared(shared): assert (shared/"data").is_dir()
