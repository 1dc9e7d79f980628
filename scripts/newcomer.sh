#!/bin/sh
# A new user's path, as docs/newcomer.md tells it, from a fresh clone to the derived series in a real Orthanc; with times.
#
#   sh scripts/newcomer.sh FOLDER [REPOSITORY]
#
# FOLDER must be empty or not there. REPOSITORY: what is cloned; this checkout where none is given. Needs git, make,
# python3 (3.11 or later; PYTHON=... for another), curl, storescu (Debian package dcmtk) and Orthanc (package orthanc).
# Everything listens on free ports of the loopback and ends with the script. With KEEP=1 it waits for Enter before that,
# so that a browser can look.
set -eu

folder=${1:?"usage: sh scripts/newcomer.sh FOLDER [REPOSITORY]"}
repository=${2:-$(cd "$(dirname "$0")/.." && pwd)}
PYTHON=${PYTHON:-python3}
export TCP_NODELAY=1                # DCMTK waits 40 ms for each object otherwise
export PATH="$PATH:/usr/sbin"       # where Debian puts Orthanc
mkdir -p "$folder"
[ -z "$(ls -A "$folder")" ] || { echo "$folder is not empty" >&2; exit 2; }
cd "$folder"
began=$(date +%s)
pids=

step() { printf '\n[%3d s] %s\n' $(($(date +%s) - began)) "$*"; }
fail() { echo "failed: $*" >&2; exit 1; }
finish() { for pid in $pids; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done; }
trap finish EXIT
trap 'exit 130' INT TERM
free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

step "1. clone"
git clone --quiet "$repository" dicomnode
cd dicomnode

step "2. install"
make --no-print-directory venv PYTHON="$PYTHON"

step "3. configure"
mkdir ../trial
node=$(free_port) web=$(free_port) orthanc=$(free_port) rest=$(free_port)
cat > ../trial/dicomnode.toml <<END
[node]
ae_title = "NBDNODE"
port = $node
data_dir = "$PWD/../trial/data"

[completeness]
quiet_s = 5

[web]
enabled = true
port = $web

[[peer]]
name = "PACS"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = $orthanc
confirm = "commitment"
query = true

[[route]]
name = "all"
when = { Modality = "PT" }
method = "nbd"
preset = "best"
send_to = ["PACS"]
END
# conf/orthanc/orthanc.json, with the ports of this trial, a folder of its own, and a study stable after 5 seconds.
sed -e "s|4242|$orthanc|; s|11112|$node|; s|/etc/orthanc/dicomnode.lua|$PWD/conf/orthanc/dicomnode.lua|" \
    -e 's|"StableAge" : 60|"StableAge" : 5|' \
    -e "s|^{|{\n  \"StorageDirectory\" : \"$PWD/../trial/orthanc\", \"IndexDirectory\" : \"$PWD/../trial/orthanc\",\n  \"HttpPort\" : $rest, \"RemoteAccessAllowed\" : false, \"AuthenticationEnabled\" : false,|" \
    conf/orthanc/orthanc.json > ../trial/orthanc.json
dicomnode() { "$PWD/.venv/bin/dicomnode" "$@" --config ../trial/dicomnode.toml; }

step "4. start Orthanc and the node"
Orthanc ../trial/orthanc.json > ../trial/orthanc.log 2>&1 &
pids="$!"
"$PWD/.venv/bin/dicomnode" serve --config ../trial/dicomnode.toml > ../trial/ready 2> ../trial/node.log &
pids="$pids $!"
for _ in $(seq 120); do
  grep -q ready ../trial/ready && curl -sf "http://127.0.0.1:$rest/system" > ../trial/system.json && break
  sleep 0.5
done
grep -q ready ../trial/ready || fail "the node does not start: $(tail -3 ../trial/node.log)"
cat ../trial/ready
dicomnode check || fail "dicomnode check"

step "5. a study: synthetic PET and CT of head and neck"
.venv/bin/dicomnode phantom ../trial/phantom --kind head-and-neck
step "6. send it to Orthanc, as a scanner does"
# Not the storescu of pynetdicom, which the environment has, too: its options are others.
/usr/bin/storescu -R -aet SCANNER -aec ORTHANC +sd +r 127.0.0.1 "$orthanc" ../trial/phantom/PET ../trial/phantom/CT

step "7. wait until the derived series is back"
said=
while :; do
  state=$(dicomnode jobs --json | "$PYTHON" -c '
import json, sys
rows = [row for row in json.load(sys.stdin) if row["modality"] == "PT"]
print(" ".join((row["state"] + " " + row["code"]).strip() for row in rows) or "nothing received yet")')
  [ "$state" = "$said" ] || { step "   $state"; said=$state; }
  case $state in
    committed*) break ;;
    held*|ignored*) dicomnode jobs; fail "it stays $state" ;;
  esac
  [ $(($(date +%s) - began)) -lt 1800 ] || fail "half an hour has gone by"
  sleep 1
done

step "8. look"
for _ in $(seq 60); do [ -s ../trial/data/web.token ] && curl -sf "http://127.0.0.1:$web/healthz" > /dev/null && break; sleep 1; done
token=$(cat ../trial/data/web.token)
page() { curl -sf -H "Authorization: Bearer $token" "http://127.0.0.1:$web$1"; }
page / > ../trial/tonight.html || fail "the status page does not answer: $(tail -3 ../trial/node.log)"
study=$(dicomnode jobs --json | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[0]["study"])')
page "/studies/$study" > ../trial/study.html || fail "the page of the study does not answer"
page /metrics | grep -E '^dicomnode_(jobs\{state="(delivered|committed)"|sent_instances|received_instances)'
curl -sf "http://127.0.0.1:$rest/series?expand" | "$PYTHON" -c '
import json, sys
for series in json.load(sys.stdin):
    tags = series["MainDicomTags"]
    print("in Orthanc:", tags["Modality"], tags.get("SeriesDescription", "?"), len(series["Instances"]), "instances")'
step "done. The page: http://127.0.0.1:$web/  its token: $token  Orthanc: http://127.0.0.1:$rest/"
[ -z "${KEEP:-}" ] || { echo "Enter ends Orthanc and the node."; read -r _; }
