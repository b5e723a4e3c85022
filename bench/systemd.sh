#!/usr/bin/env bash
# The units under a real systemd: install, READY, reload, watchdog, hooks, pages, stop.
#
#     sudo bench/systemd.sh [WORK_DIR] > transcript
#
# systemd runs as process 1 of namespaces of its own, on an overlay of this machine's root:
# the host's files, processes, network and units are left alone. Needs root, Linux with
# overlayfs and cgroup v2, systemd and dbus, and .venv (make install). Prints every command
# with what it answered; exits non-zero where a step does not hold.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
control=/sys/fs/cgroup
[ -d $control/unified ] && control=$control/unified # v1 beside v2
group=$control/pic-systemd

# What becomes process 1: mounts the root, then systemd takes over.
boot() {
    root=$work/root
    mount -t tmpfs none "$work/over"
    mkdir "$work/over/upper" "$work/over/work"
    mount -t overlay overlay \
        -o "lowerdir=/,upperdir=$work/over/upper,workdir=$work/over/work" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs none "$root/run"
    mount -t tmpfs -o mode=1777 none "$root/tmp"
    mkdir -p "$root/opt/pic" "$root/old"
    mount --bind "$work/pic" "$root/opt/pic"
    mount --bind "$work/share" "$root/mnt"
    rm -f "$root/etc/machine-id"
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    printf '[Unit]\nWants=dbus.socket\nAllowIsolate=yes\n' >"$root/etc/systemd/system/bench.target"
    cd "$root"
    pivot_root . old
    umount -l /old
    exec env -i container=pic PATH="$PATH" /lib/systemd/systemd --system --unit=bench.target
}

if [ "${2:-}" = boot ]; then
    boot
fi

# The service as the README installs it, and what it is fed.
mkdir -p "$work"/{over,root,pic,share/repo}
cp -r "$repo"/{systemd,daemon,training,pyproject.toml,constraints.txt,README.md} "$work/share/repo"
if [ ! -x "$work/pic/bin/pic-daemon" ]; then
    unshare --mount --propagation private bash -euc "
        mkdir -p /opt/pic && mount --bind '$work/pic' /opt/pic
        /usr/bin/python3 -m venv /opt/pic
        /opt/pic/bin/pip install -q '$work/share/repo[web]' --constraint '$work/share/repo/constraints.txt'" >&2
fi
"$repo/.venv/bin/python" - "$repo" "$work/share" <<'PYTHON' >&2
import sys
from pathlib import Path

sys.path.insert(0, f"{sys.argv[1]}/tests")
from conftest import write_image, write_model

write_model(Path(sys.argv[2]) / "model.onnx")
for level in (60, 200, 205, 210, 220):
    write_image(Path(sys.argv[2]) / f"{level}.png", level)
PYTHON

mkdir -p "$group"
(
    echo "$BASHPID" >"$group/cgroup.procs"
    exec unshare --mount --uts --ipc --net --cgroup --pid --fork --kill-child \
        --propagation private bash "$0" "$work" boot </dev/null >&2
) &
outer=$!
leave() {
    status=$?
    [ $status = 0 ] || inside journalctl --no-pager -u pic-daemon -n 40 >&2 || true
    kill -KILL $outer 2>/dev/null || true
    wait $outer 2>/dev/null || true
    for _ in $(seq 50); do # its processes take a moment to be gone
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.1
    done
    exit $status
}
trap leave EXIT

first() { pgrep -P "$outer" | head -1; }
inside() { nsenter -t "$(first)" --all env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_PAGER= "$@"; }
until inside systemctl is-active --quiet bench.target 2>/dev/null; do
    kill -0 $outer || exit 1
    sleep 0.2
done

say() { printf '\n## %s\n\n' "$1"; }
show() { # a command, and what it answers
    printf '    $ %s\n' "$1"
    inside bash -c "$1" 2>&1 | sed 's/^/    /'
}
holds() { # sentence, command: wait until it does, or fail
    for _ in $(seq 300); do
        if inside bash -c "$2" >/dev/null 2>&1; then
            printf -- '- %s\n' "$1"
            return
        fi
        sleep 0.2
    done
    printf -- '- NOT: %s\n' "$1"
    inside journalctl --no-pager -u 'pic-*' | tail -30
    exit 1
}
log="journalctl -u pic-daemon -o cat --no-pager"

say "Install"
inside mkdir -p /srv/drop
inside cp /mnt/200.png /mnt/60.png /srv/drop
cd "$work/share/repo"
for command in \
    'systemctl --version | head -1' \
    'install -D -m 644 /mnt/repo/systemd/pic-daemon.sysusers /etc/sysusers.d/pic-daemon.conf && systemd-sysusers' \
    'install -d -o pic-daemon -g pic-daemon -m 750 /var/lib/pic-daemon' \
    'install -o pic-daemon -g pic-daemon -m 640 /mnt/model.onnx /var/lib/pic-daemon/' \
    'cp /mnt/repo/systemd/pic-daemon.toml /etc/' \
    'cp /mnt/repo/systemd/pic-daemon.service /etc/systemd/system/ && systemctl daemon-reload' \
    'systemctl enable --now pic-daemon'; do
    show "$command"
done

say "READY (Type=notify) and the status line"
# `enable --now` returned when the service had said READY=1, not when it was forked.
show 'systemctl show pic-daemon -p Type -p ActiveState -p SubState -p NRestarts -p User'
holds "the log says ready" "$log | grep '^ready'"
holds "both pictures have rows" "[ \$($log | grep -c 'match path=') -ge 1 ] && /opt/pic/bin/pic-daemon status --database /var/lib/pic-daemon/matches.db | grep '1 match, 1 no-match'"
holds "systemctl status shows the service's own line, renewed with every heartbeat" \
    "systemctl show pic-daemon -p StatusText | grep '1 match'"
show 'systemctl show pic-daemon -p StatusText'
show "/opt/pic/bin/pic-daemon status --database /var/lib/pic-daemon/matches.db"

say "Reload"
inside bash -c 'echo "no picture" > /srv/drop/bad.png'
holds "a file that is no picture has failed" "[ \$($log | grep -c 'failed path=') = 1 ]"
show '/opt/pic/bin/pic-daemon retry --database /var/lib/pic-daemon/matches.db && systemctl reload pic-daemon'
holds "it was tried again at once, by the same process" \
    "[ \$($log | grep -c 'failed path=') = 2 ] && [ \$(systemctl show pic-daemon -p NRestarts --value) = 0 ]"
inside rm /srv/drop/bad.png

say "Watchdog: a service that stands still is killed and started again"
show 'systemctl show pic-daemon -p WatchdogUSec'
inside bash -c 'mkdir -p /run/systemd/system/pic-daemon.service.d
printf "[Service]\nWatchdogSec=8\n" > /run/systemd/system/pic-daemon.service.d/short.conf
systemctl daemon-reload && systemctl restart pic-daemon'
echo "    (shortened to 8 s for the rest of this)"
before=$(inside systemctl show pic-daemon -p MainPID --value)
show 'kill -STOP $(systemctl show pic-daemon -p MainPID --value)'
inside cp /mnt/210.png /srv/drop
holds "systemd saw no sign of life and started it again" \
    "[ \$(systemctl show pic-daemon -p NRestarts --value) = 1 ] && systemctl is-active pic-daemon && [ \$(systemctl show pic-daemon -p MainPID --value) != $before ]"
show "journalctl -u pic-daemon -o cat --no-pager | grep -i 'watchdog'"
holds "what was dropped while it stood still has its row" \
    "/opt/pic/bin/pic-matches --database /var/lib/pic-daemon/matches.db | grep 210.png"

say "Killed outright"
show 'systemctl kill -s KILL pic-daemon'
inside cp /mnt/220.png /srv/drop
holds "started again, and the row is there" \
    "/opt/pic/bin/pic-matches --database /var/lib/pic-daemon/matches.db | grep 220.png"

say "Hooks, inside what the unit allows"
inside bash -c 'ip addr add 192.0.2.10/32 dev lo
cat > /mnt/receiver.py <<PYTHON
from http.server import BaseHTTPRequestHandler, HTTPServer

class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(204)
        self.end_headers()

HTTPServer(("192.0.2.10", 80), Receiver).serve_forever()
PYTHON
systemd-run --quiet --unit receiver /usr/bin/python3 /mnt/receiver.py
sed -i "/^model/i webhook = \"http://192.0.2.10/\"\ncommand = [\"/usr/bin/tee\", \"-a\", \"/var/lib/pic-daemon/told.jsonl\"]" /etc/pic-daemon.toml'
show 'grep -E "^(webhook|command)" /etc/pic-daemon.toml'
show 'systemctl restart pic-daemon'
inside cp /mnt/205.png /srv/drop
holds "the program was told" "grep 205.png /var/lib/pic-daemon/told.jsonl"
holds "the address was not: the unit lets the service reach loopback alone" "$log | grep 'webhook: delivery .* failed'"
show "$log | grep 'webhook: delivery' | head -1"
show 'install -D -m 644 /mnt/repo/systemd/pic-daemon-hooks.conf /etc/systemd/system/pic-daemon.service.d/hooks.conf && systemctl daemon-reload && systemctl restart pic-daemon'
holds "with the drop-in, the address was told what had waited" \
    "journalctl -u receiver -o cat --no-pager | grep 205.png"
show "/opt/pic/bin/pic-daemon status --database /var/lib/pic-daemon/matches.db"

say "The pages"
pages=http://127.0.0.1:8001
inside bash -c 'mkdir /srv/catalog && cp /mnt/200.png /srv/catalog'
show 'cp /mnt/repo/systemd/pic-matches.service /etc/systemd/system/ && systemctl daemon-reload && systemctl enable --now pic-matches'
holds "the list names a match, and its picture is shown" \
    "curl -fs $pages/matches | grep 220.png && curl -fs -o /dev/null -w '%{content_type}' $pages/picture/1/dropped/small | grep image/jpeg"
show "curl -s -o /dev/null -w '%{http_code} %{redirect_url}\n' -d label=ours $pages/record/1/correction"
holds "the correction is in the log, by the account of the unit" \
    "/opt/pic/bin/python -c 'import sqlite3; assert sqlite3.connect(\"/var/lib/pic-daemon/matches.db\").execute(\"SELECT label, who FROM corrections\").fetchall() == [(\"ours\", \"pic-daemon\")]'"
holds "no other machine reaches them" "! curl -s --max-time 2 http://192.0.2.10:8001/matches"
show 'install -m 640 -g pic-daemon /dev/null /etc/pic-matches.token; openssl rand -hex 24 > /etc/pic-matches.token; install -D -m 644 /mnt/repo/systemd/pic-matches-network.conf /etc/systemd/system/pic-matches.service.d/network.conf && systemctl daemon-reload && systemctl restart pic-matches'
holds "with the drop-in they answer elsewhere, to the token alone" \
    "[ \$(curl -s -o /dev/null -w '%{http_code}' http://192.0.2.10:8001/matches) = 401 ] && curl -fs -H \"Authorization: Bearer \$(cat /etc/pic-matches.token)\" http://192.0.2.10:8001/matches | grep 220.png"
show 'systemd-analyze security pic-matches --no-pager | tail -1'
show 'systemctl stop pic-matches; systemctl show pic-matches -p ActiveState -p Result'

say "A wrong setting is not tried for ever"
show "sed -i 's/^model =.*/modle = 1/' /etc/pic-daemon.toml; systemctl restart pic-daemon || true"
holds "exit code 2 ends it for good" \
    "systemctl show pic-daemon -p ActiveState --value | grep failed && [ \$(systemctl show pic-daemon -p ExecMainStatus --value) = 2 ]"
show 'journalctl -u pic-daemon -o cat --no-pager | grep "unknown key"'
inside cp /mnt/repo/systemd/pic-daemon.toml /etc/
inside bash -c 'systemctl reset-failed pic-daemon; systemctl start pic-daemon'

say "Stop"
show 'systemctl stop pic-daemon'
show 'systemctl show pic-daemon -p ActiveState -p Result -p ExecMainStatus'
holds "it ended by itself, with exit code 0" \
    "[ \$(systemctl show pic-daemon -p Result --value) = success ] && [ \$(systemctl show pic-daemon -p ExecMainStatus --value) = 0 ]"
holds "the log is sound" "/opt/pic/bin/python -c 'import sqlite3; assert sqlite3.connect(\"/var/lib/pic-daemon/matches.db\").execute(\"PRAGMA integrity_check\").fetchone() == (\"ok\",)'"
show 'systemd-analyze security pic-daemon --no-pager | tail -1'
