# Sourced by the scripts that start programs: none outlives its script, and a stage that fails is named at the end.
#
# Bash answers no signal while a command runs in the foreground, so every program runs in the background and is waited for.
# There it ignores Ctrl-C, and the script hands every signal on as SIGTERM: a program gets each signal once, whoever sent it.
# When its programs have ended, the script exits with 128 + the signal. Where a script is killed by SIGKILL, the kernel kills
# its programs (setpriv, Linux only).

children=() stopped="" tied=()
if setpriv --pdeathsig KILL true 2>/dev/null; then tied=(setpriv --pdeathsig KILL); fi

hand_on() {  # hand_on SIGNAL: by number
  stopped=$((128 + $1))
  if [ ${#children[@]} -eq 0 ]; then leave; fi
  kill -TERM "${children[@]}" 2>/dev/null || true
}

leave() {
  [ -n "${STAGE:-}" ] || echo "$(basename "$0"): stopped by a signal; the same command goes on from here" >&2
  exit "$stopped"
}

trap 'hand_on 1' HUP
trap 'hand_on 2' INT
trap 'hand_on 15' TERM

start() {  # start PROGRAM ARGUMENTS...: as the child $!
  ${tied[@]+"${tied[@]}"} "$@" &
  children+=($!)
  [ -z "$stopped" ] || kill -TERM $! 2>/dev/null || true  # a signal that came between the two lines above
}

# await PID: waits for a child -> its status. After a signal it waits for all children and ends the script.
await() {
  local status=0 pid left=()
  while true; do  # a signal ends a `wait` early
    wait "$1" 2>/dev/null && status=0 || status=$?
    kill -0 "$1" 2>/dev/null || break
  done
  for pid in "${children[@]}"; do [ "$pid" = "$1" ] || left+=("$pid"); done
  children=(${left[@]+"${left[@]}"})
  if [ -n "$stopped" ]; then
    [ ${#children[@]} -eq 0 ] || await "${children[0]}"
    leave
  fi
  return "$status"
}

attend() { start "$@" && await $!; }

python() { attend "$SETUP_PYTHON" "$@"; }  # in place of setup.sh's

# -- stages: a pipeline starts scripts on cards, side by side where there are several ---------------------------------------

LEFT_OUT=3  # the status of a stage whose start is not there, since another stage failed
failed=() left_out=() worked=""
cards=("") running=() names=()  # card, child and name by place; without a card one stage runs at a time

note() {  # note STATUS STAGE: how a stage ended
  case $1 in 0) ;; "$LEFT_OUT") left_out+=("$2") ;; *) failed+=("$2 (status $1)") ;; esac
}

# stage NAME COMMAND...: one stage after the other. A mistake (status 2) in the first one is the command's: the script ends.
stage() {
  local status=0
  "${@:2}" || status=$?
  if [ "$status" = 2 ] && [ -z "$worked" ]; then exit 2; fi
  worked=1
  note "$status" "$1"
}

end_stage() {  # end_stage PLACE: waits for it
  local status=0
  [ -n "${running[$1]:-}" ] || return 0
  await "${running[$1]}" || status=$?
  running[$1]=""
  note "$status" "${names[$1]}"
}

# await_card: waits until a card is free. Sets place.
await_card() {
  if [ ${#cards[@]} -eq 1 ]; then place=0 && end_stage 0 && return; fi
  while true; do
    for place in "${!cards[@]}"; do
      if [ -z "${running[place]:-}" ]; then return; fi
      if ! kill -0 "${running[place]}" 2>/dev/null; then end_stage "$place" && return; fi
    done
    sleep 0.1
  done
}

# begin STAGE: starts "[VAR=value] SCRIPT [RANK]" on the next free card. flags: for every stage
begin() {
  local words variable=()
  await_card
  read -ra words <<< "$1"
  case ${words[0]} in *=*) variable=("${words[0]}") && words=("${words[@]:1}") ;; esac
  start env STAGE=1 ${cards[place]:+"CUDA_VISIBLE_DEVICES=${cards[place]}"} ${variable[@]+"${variable[@]}"} \
    bash "scripts/${words[0]}" "${words[@]:1}" ${flags[@]+"${flags[@]}"}
  running[place]=$! names[place]="${OUT:+$OUT: }${1#METHOD=svd }"
}

await_all() { for place in "${!cards[@]}"; do end_stage "$place"; done; }

# The end of a pipeline: status 1 and the names where stages failed.
name_failures() {
  [ ${#failed[@]} -gt 0 ] || [ ${#left_out[@]} -gt 0 ] || return 0
  local name
  name=$(basename "$0")
  if [ ${#failed[@]} -gt 0 ]; then echo "$name: failed:" >&2 && printf '  %s\n' "${failed[@]}" >&2; fi
  if [ ${#left_out[@]} -gt 0 ]; then
    echo "$name: skipped, since the run that they start from is missing:" >&2 && printf '  %s\n' "${left_out[@]}" >&2
  fi
  echo "$name: all else is done; the same command runs these again" >&2
  exit 1
}
