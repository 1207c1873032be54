"""`python -m benchmarks`: the benchmarks that need no data and take minutes, in turn."""

from benchmarks import codec, memory, step, switch

if __name__ == "__main__":
    for benchmark in (step, memory, switch, codec):
        benchmark.main()
