"""The fault campaign, `ci/faults`: runs that are killed, starved, damaged or asked to stop, and what comes of them."""
