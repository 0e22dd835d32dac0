"""The random state of the devices: each has a generator of its own, apart from the CPU's."""

import torch
from torch.accelerator import current_device_index

from torch_npu._C import default_generator, device_count


def default_generators():
    """The generators that operators draw from, by device index."""
    return tuple(map(default_generator, range(device_count())))


def get_rng_state(device="npu"):
    """The state of one device, a byte tensor on the CPU."""
    return _generator(device).get_state()


def set_rng_state(new_state, device="npu"):
    """Set the state of one device."""
    _generator(device).set_state(new_state)


def get_rng_state_all():
    """The states of all devices."""
    return [generator.get_state() for generator in default_generators()]


def set_rng_state_all(new_states):
    """Set the states of all devices."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


def manual_seed(seed):
    """Seed the current device."""
    _generator("npu").manual_seed(int(seed))


def manual_seed_all(seed):
    """Seed every device."""
    for generator in default_generators():
        generator.manual_seed(int(seed))


def seed():
    """Seed the current device with a number that differs each time."""
    _generator("npu").seed()


def seed_all():
    """Seed every device with one number that differs each time."""
    manual_seed_all(torch.random.default_generator.clone_state().seed())


def initial_seed():
    """The seed of the current device."""
    return _generator("npu").initial_seed()


def _generator(device):
    index = device if isinstance(device, int) else torch.device(device).index
    return default_generator(current_device_index() if index is None else index)
