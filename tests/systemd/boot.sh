#!/bin/bash
# Boots a systemd of its own for a test, as PID 1 of its own pid, mount, cgroup, ipc, uts and network namespaces:
#   boot.sh FOLDER UNITS [PATH...]   in the foreground, until it ends; FOLDER/pid holds the pid of the one above PID 1
#   boot.sh check                    whether this is such a place; anything else is refused
# Inside, the machine's files are read-only, and every place that a systemd writes to (or clears: its rules empty /tmp)
# is a private tmpfs. PATHs are shown where they are, read-only, also below such a place.
set -euo pipefail

PRIVATE="/tmp /run /var /root /home /mnt /dev /dev/shm /etc/systemd/system"

refuse() { echo "boot.sh: $1: refusing to go on" >&2; exit 97; }

check() {  # $1: the pid that this has to be
  [ "$1" = 1 ] || refuse "this is not PID 1 of its own namespace"
  for place in $PRIVATE /srv /media /opt; do
    [ ! -d "$place" ] || [ "$(stat -f -c %T "$place")" = tmpfs ] || refuse "$place is the machine's own"
  done
  for place in / /etc /usr; do [ ! -w "$place" ] || refuse "$place is writable"; done
  [ "$(find /proc -maxdepth 1 -name '[0-9]*' | wc -l)" -lt 10 ] || refuse "other processes are to be seen"
}

inside() {
  local root=$1/root units=$2 place node; shift 2
  mount --bind / "$root"; mount -o remount,bind,ro "$root"
  private() { mount -t tmpfs -o "mode=$2,nosuid,nodev,size=256m" tmpfs "$root$1"; }
  for place in /run /var /home /mnt; do private $place 755; done
  private /tmp 1777; private /root 700
  for place in /srv /media /opt; do [ ! -d "$root$place" ] || private $place 755; done
  [ -d "$root/etc/systemd/system" ] || refuse "there is no /etc/systemd/system"
  private /etc/systemd/system 755
  mkdir -p "$root"/var/{log,lib,tmp,cache} "$root/run/lock"; ln -s /run "$root/var/run"; chmod 1777 "$root/var/tmp"
  mount -t tmpfs -o mode=755,nosuid,size=64m tmpfs "$root/dev"
  mkdir "$root"/dev/{pts,shm}
  for node in null zero full random urandom tty; do : > "$root/dev/$node"; mount --bind /dev/$node "$root/dev/$node"; done
  : > "$root/dev/console"; mount --bind /dev/null "$root/dev/console"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"; ln -s pts/ptmx "$root/dev/ptmx"
  mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"; ln -s /proc/self/fd "$root/dev/fd"
  mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
  for place in sys sysrq-trigger irq bus; do
    [ ! -e "$root/proc/$place" ] || { mount --bind "$root/proc/$place" "$root/proc/$place"
      mount -o remount,bind,ro "$root/proc/$place"; }
  done
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
  cp -r "$units" "$root/run/units"
  for place in "$@"; do
    mkdir -p "$root$place"; mount --rbind "$place" "$root$place"; mount -o remount,bind,ro "$root$place"
  done
  mkdir "$root/run/old"; cd "$root"; pivot_root . run/old; cd /; umount -l /run/old; rmdir /run/old
  check $$
  mount --make-rshared /  # a peer group of its own, which no systemd makes in a container
  # hold on to nothing of whoever called, and have no right that reaches out of here
  exec env -i container=boot-sh PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units:/run/systemd/transient \
    SYSTEMD_GENERATOR_PATH=/run/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/none \
    setpriv --bounding-set=-sys_module,-sys_rawio,-sys_time,-sys_boot,-mac_admin,-mac_override,-syslog \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=0
}

outside() {
  local folder units base=/sys/fs/cgroup cgroup code=0
  folder=$(realpath "$1"); units=$(realpath "$2"); shift 2
  mkdir -p "$folder/root"
  [ -e $base/cgroup.procs ] || base=$base/unified
  cgroup=$base/boot-sh-$$; mkdir "$cgroup"
  ( echo $BASHPID > "$cgroup/cgroup.procs"
    exec setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child=SIGKILL --cgroup --ipc --uts --net \
      --propagation private -- "$(realpath "$0")" inside "$folder" "$units" "$@" ) &
  echo $! > "$folder/pid.new"; mv "$folder/pid.new" "$folder/pid"
  trap 'kill -KILL $(cat "$folder/pid")' TERM INT
  while kill -0 "$(cat "$folder/pid")" 2>/dev/null; do wait $! && code=0 || code=$?; done
  echo 1 > "$cgroup/cgroup.kill" 2>/dev/null || true
  for _ in $(seq 50); do
    find "$cgroup" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    [ -d "$cgroup" ] || break
    sleep 0.05
  done
  exit $code
}

case ${1-} in
check) check $$ ;;
inside) shift; inside "$@" ;;
*) outside "$@" ;;
esac
