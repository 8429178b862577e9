"""All benchmarks that stand beside a peer or a limit, one after the other. Run: make bench"""

import harness
import policy
import reward

if __name__ == "__main__":
    harness.main([*reward.BENCHMARKS, *policy.BENCHMARKS], __doc__)
