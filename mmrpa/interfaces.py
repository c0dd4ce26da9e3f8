"""Which network interface reaches another machine.

gloo listens at the address that the machine's own name stands for. Where that
is 127.0.0.1, as many systems have it in /etc/hosts, the other machines can not
reach it and the group waits for its time-out, half an hour, without a word.
GLOO_SOCKET_IFNAME names an interface instead.
"""

import os
import socket
import struct
from collections.abc import MutableMapping

from .preflight import ConfigError

_NAME = 'GLOO_SOCKET_IFNAME'
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface
_ANY_PORT = 9  # nothing is sent to it


def choose_gloo_interface(
        environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Let gloo use the interface that reaches MASTER_ADDR, if it must.

    That is, if the group has processes on other machines and nobody has set
    GLOO_SOCKET_IFNAME.

    Args:
        environment (MutableMapping): What torchrun has set; GLOO_SOCKET_IFNAME
            is added to it.

    Returns:
        str | None: The interface that was chosen.

    Raises:
        ConfigError: MASTER_ADDR is a name that this machine has for itself,
            such as Debian's 127.0.1.1, where no other machine reaches it.
    """
    if _NAME in environment or environment.get('WORLD_SIZE') == \
            environment.get('LOCAL_WORLD_SIZE'):
        return None
    host = environment['MASTER_ADDR']
    name = interface_to(host)
    # Several launchers on one machine have 127.0.0.1 on purpose.
    if name == 'lo' and not (host == 'localhost' or host.startswith('127.')):
        raise ConfigError(
            f'MASTER_ADDR={host} is {socket.gethostbyname(host)} on this '
            'machine, where no other machine reaches it. Give an address of '
            'machine 0 that the others reach (hostname -I shows them)')
    if name is not None:
        environment[_NAME] = name
    return name


def interface_to(host: str) -> str | None:
    """The interface by which this machine reaches an IPv4 host.

    Args:
        host (str): A name or an address.

    Returns:
        str | None: None if there is no route to it, or where the system is
        not Linux.
    """
    import fcntl
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))
        except OSError:
            return None
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = struct.pack('256s', name.encode())
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if answer[20:24] == own:
                return name
    return None
