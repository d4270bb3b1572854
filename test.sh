#!/bin/sh
# test.sh [ACME-STEP]        test the program, from the outside
# test.sh demo [ACME-STEP]   issue a certificate as the README does it
# test.sh deps               see to it that what these need is there
#
# The CA is Pebble, which validates for real: its DNS answers come from
# pebble-challtestsrv, and a web server stands on loopback.  What our
# program makes is judged by openssl and by what the CA itself says.
#
# "not ok" is followed by what the test printed; TRACE=1 in the
# environment adds the commands of each.
# shellcheck disable=SC2016	# check and dies evaluate their arguments

task=check
case ${1-} in deps|demo) task=$1; shift ;; esac
src=$(cd "$(dirname "$0")" && pwd)
acme=${1:-$src/acme-step}
case $acme in /*) ;; *) acme=$PWD/$acme ;; esac
cache=$src/.cache

# The tests know what is in their environment.
unset ACME_DIRECTORY ACME_KEY ACME_ACCOUNT ACME_CA_FILE ACME_TIMEOUT \
    ACME_RESOLVE ACME_PROXY_COMMAND ACME_BOX ACME_EAB_KID \
    ACME_EAB_HMAC_KEY SSL_CERT_FILE https_proxy no_proxy HTTPS_PROXY \
    NO_PROXY
LC_ALL=C
export LC_ALL

give_up() {
	echo "test.sh: $*" >&2
	exit 1
}

# ------------------------------------------------- what the tests need --

# A command or a file, and the Debian package that has it.
needs() {
	cat <<-'EOF'
	cc				gcc
	/usr/include/stdio.h		libc6-dev
	musl-gcc			musl-tools
	/usr/include/bearssl.h		libbearssl-dev
	readelf				binutils
	awk				mawk
	bash				bash
	busybox				busybox
	curl				curl
	dash				dash
	diff				diffutils
	mount				mount
	openssl				openssl
	setpriv				util-linux
	socat				socat
	/etc/ssl/certs/ca-certificates.crt			ca-certificates
	/usr/share/keyrings/debian-archive-keyring.gpg	debian-archive-keyring
	EOF
}

missing() {
	needs | while read -r thing package; do
		case $thing in
		/*)	[ -e "$thing" ] ;;
		*)	command -v "$thing" >/dev/null ;;
		esac || echo "$package"
	done
}

packages() {
	# shellcheck disable=SC2046	# one word a package
	set -- $(missing)
	[ $# = 0 ] && return
	[ "$(id -u)" = 0 ] || give_up "please install: $*"
	command -v apt-get >/dev/null || give_up "please install: $*"
	echo "test.sh: installing $*"
	DEBIAN_FRONTEND=noninteractive
	export DEBIAN_FRONTEND
	{ apt-get -q update &&
	  apt-get -q -y --no-install-recommends install "$@"; } \
	    >"$cache/apt.log" 2>&1 || {
		cat "$cache/apt.log" >&2
		give_up "cannot install: $*"
	}
	[ -z "$(missing)" ] || give_up "still missing:" "$(missing)"
}

# apt-get with a state of its own, so that the machine's stays as it is.
private_apt() {
	apt-get -q -o Dir::State::lists="$cache/lists" -o Dir::Cache="$cache" \
	    -o APT::Sandbox::User=root "$@"
}

unstable_apt() {
	private_apt -o Dir::Etc::sourcelist="$cache/unstable.list" \
	    -o Dir::Etc::sourceparts=/dev/null "$@"
}

# Where this machine gets Debian from; the origin is known only once the
# lists have been fetched.
mirror() {
	{ apt-get indextargets --format '$(SITE) $(ORIGIN) $(CODENAME)'
	  private_apt update >/dev/null
	  private_apt indextargets --format '$(SITE) $(ORIGIN) $(CODENAME)'
	} | awk '$2 == "Debian" && $3 !~ /security/ { print $1; exit }'
}

# Pebble comes from Debian unstable; older releases do not have it.  It is
# unpacked aside and renamed, since two runs may get here at once.
fetch_pebble() (
	mkdir -p "$cache/lists/partial" "$cache/archives/partial" &&
	new=$(mktemp -d "$cache/new.XXXXXX") && cd "$new" || exit
	chmod 755 .
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
	    "$(mirror) unstable main" >"$cache/unstable.list" &&
	unstable_apt update && unstable_apt download pebble &&
	dpkg-deb -x pebble_*.deb . && usr/bin/pebble -version || exit
	mv -T "$new" "$cache/pebble" || [ -x "$cache/pebble/usr/bin/pebble" ]
)

deps() {
	mkdir -p "$cache" || exit
	packages
	[ -x "$cache/pebble/usr/bin/pebble" ] && return
	echo "test.sh: fetching pebble"
	fetch_pebble >"$cache/pebble.log" 2>&1 || {
		cat "$cache/pebble.log" >&2
		give_up "cannot fetch pebble"
	}
}

deps
[ "$task" = deps ] && exit
[ -x "$acme" ] || give_up "no $acme: run make"

# ------------------------------------------------------------- helpers --

tmp=$(mktemp -d) || exit
pids='' pebble_pids='' n=0 bad=0
clean() {
	trap '' HUP INT TERM
	# shellcheck disable=SC2086	# one word a process
	kill $pids $pebble_pids 2>/dev/null
	wait
	chmod -R u+w "$tmp"
	rm -rf "$tmp"
}
trap clean EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$tmp" || exit
mkdir bin && ln -s "$acme" bin/acme-step || exit
PATH=$tmp/bin:$PATH
export PATH

group() {
	echo "# $1"
}

# check NAME CODE...: the code must succeed; it runs in a subshell.
check() {
	name=$1 n=$((n + 1)); shift
	if (${TRACE:+set -x}; eval "$*") </dev/null >log 2>&1; then
		printf 'ok %d - %s\n' "$n" "$name"
	else
		printf 'not ok %d - %s\n' "$n" "$name"
		cat -v log | sed 's/^/# /'
		bad=$((bad + 1))
	fi
}

# dies STATUS WORDS CODE...: it exits so and says so, in one line on
# standard error and nothing on standard output.
dies() {
	want=$1 words=$2; shift 2
	code=$*
	check "dies $want, $words: $(printf %s "$code" |
	    tr -s ' \t\n' ' ')" died
}

died() {
	(set +x; eval "$code") >out 2>err
	got=$?
	echo "exit status $got"
	cat out err
	[ $got = "$want" ] && [ ! -s out ] && grep -q -e "$words" err &&
	    [ "$(grep -c '' err)" = 1 ] && grep -q '^acme-step: ' err
}

# not COMMAND...: it fails, and is not ended by a signal.
not() {
	"$@"
	set -- $?
	[ "$1" != 0 ] && [ "$1" -lt 128 ]
}

# await COMMAND...: up to 20 seconds until it succeeds.
await() {
	for _ in $(seq 100); do
		"$@" >/dev/null 2>&1 && return
		sleep 0.2
	done
	echo "no success: $*"
	return 1
}

# server_start COMMAND...: in the background, until the end of the tests.
server_start() {
	"$@" >>servers.log 2>&1 &
	pids="$pids $!"
}

# A port that nobody has, below those that the system gives to clients;
# at random, so that runs at the same time do not meet.
free_port() {
	while
		port=$(shuf -i 20000-31999 -n 1)
		grep -qi "$(printf ':%04X ' "$port")" /proc/net/tcp \
		    /proc/net/udp /proc/net/tcp6 /proc/net/udp6 2>/dev/null
	do :; done
	echo "$port"
}

# listening PORT
listening() {
	cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
	grep -qi "$(printf ':%04X 0*:0000 0A' "$1")"
}

# -------------------------------------------------- the CA and the web --

# Everything that Pebble needs beside itself.
world_start() {
	dns=$(free_port)
	dns_control=$(free_port)
	web=$(free_port)
	tls=$(free_port)
	www=$tmp/www/.well-known/acme-challenge
	mkdir -p "$www"
	certificates
	bin=$cache/pebble/usr/bin
	server_start "$bin/pebble-challtestsrv" -dnsserver "127.0.0.1:$dns" \
	    -management "127.0.0.1:$dns_control" -http01 '' -https01 '' \
	    -tlsalpn01 '' -doh '' -defaultIPv4 127.0.0.1 -defaultIPv6 ''
	server_start busybox httpd -f -p "127.0.0.1:$web" -h "$tmp/www"
	up "$dns_control" "$web"
}

# up PORT...: wait until there are servers.
up() {
	for port_wanted; do
		await listening "$port_wanted" || give_up "$(cat servers.log)"
	done
}

# A throw-away CA for Pebble's own HTTPS.
certificates() {
	cat >server.ext <<-EOF
	basicConstraints = CA:FALSE
	subjectAltName = DNS:localhost,DNS:pebble.test,IP:127.0.0.1,IP:::1
	EOF
	new='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
	# shellcheck disable=SC2086	# options
	{ openssl req -x509 $new -keyout ca.key -out ca.pem -days 30 \
	    -subj '/CN=test CA' &&
	  openssl req $new -keyout server.key -out server.csr -subj / &&
	  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key \
	    -CAcreateserial -days 30 -extfile server.ext -out server.pem
	} 2>>servers.log || give_up "$(cat servers.log)"
}

# pebble_start [VARIABLE=VALUE]...: a new Pebble, in that environment.
pebble_start() {
	pebble=$(free_port)
	management=$(free_port)
	cat >pebble.json <<-EOF
	{ "pebble": {
		"listenAddress": "127.0.0.1:$pebble",
		"managementListenAddress": "127.0.0.1:$management",
		"certificate": "server.pem", "privateKey": "server.key",
		"httpPort": $web, "tlsPort": $tls,
		"externalAccountBindingRequired": false,
		"domainBlocklist": ["blocked.test"],
		"retryAfter": { "authz": 1, "order": 1 },
		"keyAlgorithm": "ecdsa",
		"profiles": {
			"default": {
				"description": "ninety days",
				"validityPeriod": 7776000 },
			"shortlived": {
				"description": "six days",
				"validityPeriod": 518400 } }
	} }
	EOF
	env PEBBLE_VA_NOSLEEP=1 PEBBLE_AUTHZREUSE=0 "$@" \
	    "$bin/pebble" -config pebble.json -dnsserver "127.0.0.1:$dns" \
	    >>servers.log 2>&1 &
	pebble_pids=$!
	up "$pebble" "$management"
	control roots/0 >root.pem || give_up "no root certificate of pebble"
	ACME_DIRECTORY=https://localhost:$pebble/dir
	ACME_CA_FILE=$tmp/ca.pem
	ACME_TIMEOUT=60
	export ACME_DIRECTORY ACME_CA_FILE ACME_TIMEOUT
}

pebble_stop() {
	{ kill "$pebble_pids" && wait "$pebble_pids"; } 2>>servers.log
	pebble_pids=
}

# control PATH: ask Pebble's management interface.
control() {
	curl -sS --fail --cacert ca.pem "https://127.0.0.1:$management/$1"
}

# resolver COMMAND JSON: tell the DNS server what to answer.
resolver() {
	curl -sS --fail -d "$2" "http://127.0.0.1:$dns_control/$1"
}

# What a script does with the challenges of the record on its standard
# input, where it publishes them itself.
publish() {
	grep '^challenge ' |
	while read -r _ type _ _ _ name content; do
		case $type in
		http-01)
			printf %s "$content" >"$www/$name" ;;
		dns-01)
			resolver set-txt "{\"host\": \"$name.\",
			    \"value\": \"$content\"}" ;;
		*)	echo "what is $type?"; return 1 ;;
		esac || return
	done
}

# -------------------------------------------------------------- oracles --

# issued KEY CHAIN NAME...: the chain ends at Pebble's root, and the leaf
# is for that key and those names, written as openssl does.
issued() {
	key=$1 chain=$2; shift 2
	openssl verify -CAfile root.pem -untrusted "$chain" "$chain" &&
	openssl pkey -in "$key" -pubout >want.pub &&
	openssl x509 -in "$chain" -noout -pubkey | diff want.pub - &&
	printf '%s\n' "$@" | sort >want.names &&
	names_in "$chain" | diff want.names -
}

# names_in CERT: those of its subjectAltName, sorted.
names_in() {
	openssl x509 -in "$1" -noout -ext subjectAltName |
	sed -e 1d -e 's/^ *//' -e 's/, /\
/g' | sort
}

base64url() {
	openssl base64 -A | tr +/ -_ | tr -d =
}

# The public key's thumbprint, as RFC 7638 has it.
thumbprint_of() {
	case $(openssl pkey -in "$1" -noout -text) in
	*P-256*)	ec_jwk "$1" P-256 32 ;;
	*P-384*)	ec_jwk "$1" P-384 48 ;;
	*)		rsa_jwk "$1" ;;
	esac | openssl dgst -sha256 -binary | base64url
}

# The point is at the end of the key's DER: two numbers of that length.
ec_jwk() {
	openssl pkey -in "$1" -pubout -outform DER | tail -c $(($3 * 2)) >xy
	printf '{"crv":"%s","kty":"EC","x":"%s","y":"%s"}' "$2" \
	    "$(head -c "$3" xy | base64url)" "$(tail -c "$3" xy | base64url)"
}

rsa_jwk() {
	printf '{"e":"AQAB","kty":"RSA","n":"%s"}' "$(
	openssl rsa -in "$1" -noout -modulus | cut -d= -f2 |
	busybox xxd -r -p | base64url)"
}

# field KEYWORD [RECORD]: the first such line's rest.
field() {
	sed -n "s/^$1 //p" ${2+"$2"} | head -n 1
}

# status_of CERT: what the CA says of it, in JSON.
status_of() {
	control "cert-status-by-serial/$(
	openssl x509 -in "$1" -noout -serial | cut -d= -f2)"
}

# The README's first pipeline, with the web server's real directory.
quick_start() {
	awk '/^[^ \t]/ { inside = /^QUICK START/; next }
	    !inside || !NF { block = 0; next }
	    /^[ \t]+acme-step key / { block = 1 }
	    block { sub(/^[ \t]+/, ""); print }' "$src/README" |
	sed "s|/var/www/acme|$www|"
}

# ----------------------------------------------------------------- demo --

demo() {
	world_start
	pebble_start
	quick_start >quick
	[ -s quick ] || give_up "no commands in README"
	echo "A CA is on loopback: ACME_DIRECTORY=$ACME_DIRECTORY"
	while IFS= read -r line <&3; do
		command=${command:+$command
}$line
		case $line in *\||*\\) continue ;; esac
		run "$command"
		command=
	done 3<quick
	echo
	run 'openssl x509 -in fullchain.pem -noout -issuer -ext subjectAltName'
	run 'openssl verify -CAfile root.pem \
    -untrusted fullchain.pem fullchain.pem'
}

run() {
	printf '$ %s\n' "$1"
	eval "$1" || exit
}

if [ "$task" = demo ]; then
	demo
	exit
fi

# ---------------------------------------------------------------- tests --

# (the tests of the offline commands and of hostile servers come here)

world_start

# The whole way, for all kinds of names and keys.
issuance() {
	rm -f ./*.key.pem
	unset ACME_ACCOUNT
	ACME_KEY=$tmp/account.key.pem
	export ACME_KEY

	check 'an account' '
	    acme-step key -o "$ACME_KEY" &&
	    acme-step new-account -y -m mailto:ops@example.com -o account &&
	    [ "$(field directory account)" = "$ACME_DIRECTORY" ] &&
	    grep "^new-nonce https://" account &&
	    grep "^account https://" account'
	ACME_ACCOUNT=$tmp/account
	export ACME_ACCOUNT

	check 'one name' '
	    acme-step key -o one.key.pem &&
	    acme-step new-order one.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o one.pem &&
	    issued one.key.pem one.pem DNS:one.test'
	check 'nothing is left in the web server' '
	    [ -z "$(ls "$www")" ]'
	check 'three names' '
	    acme-step new-order b.test a.test c.a.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o three.pem &&
	    issued one.key.pem three.pem DNS:a.test DNS:b.test DNS:c.a.test'
	check 'a wildcard and its base, by DNS' '
	    acme-step new-order "*.wild.test" wild.test |
	    acme-step challenges -t dns-01 >wild &&
	    [ "$(grep -c "^challenge dns-01 dns .* _acme-challenge.wild.test " \
		wild)" = 2 ] && publish <wild &&
	    acme-step respond -t dns-01 <wild |
	    acme-step finalize -K one.key.pem -o wild.pem &&
	    issued one.key.pem wild.pem "DNS:*.wild.test" DNS:wild.test'
	check 'an IP address' '
	    acme-step new-order 127.0.0.1 | tee ip |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o ip.pem &&
	    grep -x "identifier ip 127.0.0.1" ip &&
	    issued one.key.pem ip.pem "IP Address:127.0.0.1"'
	check 'a name and an IP address' '
	    acme-step new-order 127.0.0.1 with.test |
	    acme-step respond -t http-01 -w "$www" |
	    acme-step finalize -K one.key.pem -o both.pem &&
	    issued one.key.pem both.pem DNS:with.test "IP Address:127.0.0.1"'

	for type in ec256 ec384 rsa2048 rsa3072; do
		check "a certificate for a key of type $type" '
		    acme-step key -t "$type" -o "$type.key.pem" &&
		    acme-step new-order "$type.test" |
		    acme-step respond -t http-01 -w "$www" |
		    acme-step finalize -K "$type.key.pem" -o "$type.pem" &&
		    issued "$type.key.pem" "$type.pem" "DNS:$type.test"'
	done
	for type in ec384 rsa2048; do
		check "an account with a key of type $type" '
		    ACME_KEY=$type.account.key.pem
		    unset ACME_ACCOUNT
		    acme-step key -t "$type" -o "$ACME_KEY" &&
		    acme-step new-account -y -o "$type.account" &&
		    acme-step new-order -a "$type.account" "by-$type.test" |
		    acme-step respond -t http-01 -w "$www" |
		    acme-step finalize -K one.key.pem -o by.pem &&
		    issued one.key.pem by.pem "DNS:by-$type.test"'
	done
}

group 'issuance, half of the nonces refused'
pebble_start PEBBLE_WFE_NONCEREJECT=50
issuance
pebble_stop

group 'issuance'
pebble_start
issuance

group 'the directory and the account'
check 'directory' '
    acme-step directory >d && cat d &&
    curl -sS --cacert ca.pem "$ACME_DIRECTORY" >d.json &&
    for path in newNonce newAccount newOrder revokeCert keyChange \
	renewalInfo meta.termsOfService; do
	grep -F "$(acme-step json $path d.json)" d || exit
    done
    grep -w shortlived d'
check 'the address family that the CA has' '
    acme-step directory -4 | diff d -'
dies 69 'localhost' 'acme-step directory -6'
check 'trust from SSL_CERT_FILE' '
    unset ACME_CA_FILE
    SSL_CERT_FILE=ca.pem acme-step directory | diff d -'
check 'trust from -C, before ACME_CA_FILE' '
    ACME_CA_FILE=root.pem acme-step directory -C ca.pem | diff d -'
dies 69 'certificate.* root.pem' 'acme-step directory -C root.pem'
check 'new-account finds the one that is there' '
    acme-step new-account -y >again &&
    [ "$(field account again)" = "$(field account account)" ]'
check 'account' '
    acme-step account >shown && cat shown &&
    [ "$(field account shown)" = "$(field account account)" ]'
check 'account, found by its key' '
    unset ACME_ACCOUNT
    acme-step account >shown &&
    [ "$(field account shown)" = "$(field account account)" ]'
check 'new-account needs no account record, it makes one' '
    ACME_ACCOUNT=nowhere acme-step new-account -y >again &&
    [ "$(field account again)" = "$(field account account)" ]'
check 'an account record on standard input' '
    unset ACME_ACCOUNT
    acme-step new-order -a - piped.test <account | grep "^order https://"'
check 'an order of an account that its key finds' '
    unset ACME_ACCOUNT
    acme-step new-order found.test >found && grep "^order https://" found &&
    [ "$(field account found)" = "$(field account account)" ]'
check 'a key that the CA does not know' '
    acme-step key -o unknown.key.pem'
dies 77 'accountDoesNotExist' '
    unset ACME_ACCOUNT; acme-step account -k unknown.key.pem'
dies 77 'accountDoesNotExist' '
    unset ACME_ACCOUNT; acme-step new-order -k unknown.key.pem no.test'
dies 77 'agree' '
    unset ACME_ACCOUNT; acme-step new-account -k unknown.key.pem'
for type in '' ec384.account. rsa2048.account.; do
	check "thumbprint of ${type:-ec256.}key" '
	    key=${type:-account.}key.pem
	    [ "$(acme-step thumbprint -k "$key")" = \
		"$(thumbprint_of "$key")" ]'
done
check 'get is POST-as-GET' '
    acme-step get "$(field account account)" | acme-step json status |
    grep -x valid'
check 'post signs what it is given' '
    echo "{\"contact\": [\"mailto:new@example.com\"]}" |
    acme-step post "$(field account account)" |
    acme-step json contact.0 | grep -x mailto:new@example.com'
dies 77 'malformed' '
    echo "{\"contact\": 3}" | acme-step post "$(field account account)"'

group 'the record'
check 'new-order' '
    acme-step new-order rec.test 127.0.0.1 >rec && cat rec &&
    not grep -v "^[a-z-]* [!-~]" rec &&
    for word in directory new-nonce nonce account order expires finalize; do
	[ "$(grep -c "^$word [!-~]*$" rec)" = 1 ] || exit
    done
    [ "$(grep -c "^authorization https://" rec)" = 2 ] &&
    grep -x "status pending" rec && grep -x "identifier dns rec.test" rec &&
    grep -x "identifier ip 127.0.0.1" rec'
check 'order brings the record up to date' '
    acme-step order <rec >rec2 &&
    grep -v "^nonce" rec | sort >a && grep -v "^nonce" rec2 | sort |
    diff a -'
check 'lines that we do not know pass through' '
    for step in order "challenges -t http-01" \
	"respond -t http-01 -w $www" order; do
	{ cat rec; echo "note hello world"; } | acme-step $step >noted &&
	[ "$(grep -cx "note hello world" noted)" = 1 ] &&
	grep -x "identifier dns rec.test" noted || exit
    done'
check 'challenges' '
    acme-step new-order ch.test >ch && acme-step challenges <ch >ch2 &&
    cat ch2 && print=$(acme-step thumbprint) &&
    grep "^challenge http-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ _ name content <line &&
    [ "$content" = "$name.$print" ] &&
    grep "^challenge dns-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ url name content <line &&
    token=$(acme-step get "$url" | acme-step json token) &&
    [ "$name" = _acme-challenge.ch.test ] &&
    [ "$content" = "$(printf %s "$token.$print" |
	openssl dgst -sha256 -binary | base64url)" ]'
check 'challenges: tls-alpn-01' '
    grep "^challenge tls-alpn-01 dns ch.test https:" ch2 >line &&
    read -r _ _ _ _ url name content <line && [ "$name" = ch.test ] &&
    token=$(acme-step get "$url" | acme-step json token) &&
    printf %s "$token.$(acme-step thumbprint)" | openssl dgst -sha256 -hex |
    grep "[ =]$content$"'
check 'challenges of one type, added once' '
    acme-step challenges -t http-01 <ch >ch3 &&
    [ "$(grep -c "^challenge" ch3)" = 1 ] &&
    acme-step challenges -t http-01 <ch3 | grep "^challenge" >ch4 &&
    grep "^challenge" ch3 | diff - ch4'
check 'a script that publishes by itself' '
    publish <ch3 && acme-step respond -n -t http-01 <ch3 >ch5 &&
    acme-step order -W <ch5 >ch6 && grep -x "status ready" ch6 &&
    acme-step finalize -K one.key.pem -o ch.pem <ch6 &&
    issued one.key.pem ch.pem DNS:ch.test; got=$?
    rm -f "$www"/*; [ $got = 0 ]'
check 'respond -t without -w, published by itself' '
    acme-step new-order own.test | acme-step challenges -t http-01 >own &&
    publish <own && acme-step respond <own >own2 &&
    grep -x "status ready" own2; got=$?
    rm -f "$www"/*; [ $got = 0 ]'
dies 64 '-w' 'acme-step respond -n -w "$www" <ch'
dies 65 '' 'acme-step order -d "https://127.0.0.1:$pebble/dir" <rec'
dies 65 '' 'acme-step order </dev/null'
dies 65 '' 'echo nonsense | acme-step order'

group 'each step again'
check 'the whole way, each record saved' '
    acme-step new-order -o s1 saved.test &&
    acme-step respond -t http-01 -w "$www" -o s2 <s1 &&
    acme-step finalize -K one.key.pem -o s3.pem <s2 &&
    issued one.key.pem s3.pem DNS:saved.test'
check 'finalize again gives the same chain' '
    acme-step finalize -K one.key.pem -o s4.pem <s2 && cmp s3.pem s4.pem'
check 'so it does from the record of new-order' '
    acme-step finalize -K one.key.pem <s1 | cmp s3.pem -'
check 'and with the request in a file' '
    acme-step csr -K one.key.pem -o s.csr saved.test &&
    acme-step finalize -r s.csr <s2 | cmp s3.pem -'
dies 65 '' 'acme-step finalize -K ec384.key.pem <s2'
check 'respond again lets the order pass' '
    acme-step respond -t http-01 -w "$www" <s1 >s5 &&
    grep -x "status valid" s5 && [ -z "$(ls "$www")" ]'
check 'order shows that it is valid' '
    acme-step order -W <s1 >s6 && grep -x "status valid" s6 &&
    grep "^certificate https://" s6'
check 'certificate' '
    acme-step certificate <s6 | cmp s3.pem - &&
    acme-step certificate <s1 | cmp s3.pem -'
check 'finalize with a request, PEM and DER' '
    for form in PEM DER; do
	openssl req -new -key ec384.key.pem -subj / -outform $form \
	    -addext subjectAltName=DNS:csr.test -out csr &&
	acme-step new-order csr.test |
	acme-step respond -t http-01 -w "$www" |
	acme-step finalize -r csr -o csr.pem &&
	issued ec384.key.pem csr.pem DNS:csr.test || exit
    done'
check 'respond after a crash in the middle' '
    acme-step new-order crash1.test crash2.test >c1 &&
    acme-step challenges -t http-01 <c1 >c2 && publish <c2 &&
    grep -v crash2 c2 | acme-step respond -n >/dev/null &&
    acme-step respond -t http-01 -w "$www" <c2 |
    acme-step finalize -K one.key.pem -o crash.pem &&
    issued one.key.pem crash.pem DNS:crash1.test DNS:crash2.test'
front=$(free_port)
server_start socat -d -d -lf connections \
    "TCP-LISTEN:$front,bind=127.0.0.1,fork,reuseaddr" "TCP:127.0.0.1:$pebble"
up "$front"
check 'one connection for each step' '
    unset ACME_ACCOUNT
    ACME_DIRECTORY=https://127.0.0.1:$front/dir
    : >record
    for code in new-account "new-order a.test b.test" \
	"respond -t http-01 -w $www" "finalize -K one.key.pem"; do
	before=$(grep -c "accepting connection" connections)
	acme-step $code <record >next && mv next record && sleep 0.2 || exit
	after=$(grep -c "accepting connection" connections)
	echo "$code: $before $after"
	[ "$after" = $((before + 1)) ] || exit
    done'

group 'the CA refuses'
dies 77 'blocked.test' 'acme-step new-order blocked.test'
mkdir elsewhere
dies 77 'lost.test.*404' '
    acme-step new-order -o l1 lost.test &&
    acme-step respond -t http-01 -w elsewhere <l1'
check 'what was published is taken down' '[ -z "$(ls elsewhere)" ]'
dies 77 'lost.test.*404' 'acme-step respond -t http-01 -w elsewhere <l1'
dies 77 'lost.test.*404' 'acme-step finalize -K one.key.pem <l1'
check 'order prints an invalid order' '
    acme-step order <l1 | grep -x "status invalid"'
dies 77 'lost.test' 'acme-step order -W <l1'
dies 77 'bad.test' '
    resolver set-servfail "{\"host\": \"bad.test\"}"
    acme-step new-order -o l2 good.test bad.test &&
    acme-step respond -t http-01 -w "$www" <l2'
for shell in dash 'busybox ash' bash; do
	dies 77 '404' "rm -f lost.pem
	    $shell -c 'acme-step new-order lost.test |
		acme-step respond -t http-01 -w elsewhere |
		acme-step finalize -K one.key.pem -o lost.pem'"
	check "a pipeline's status in $shell" '
	    [ ! -e lost.pem ] && [ -z "$(ls elsewhere)" ] &&
	    $shell -c "
		acme-step new-order blocked.test 2>err |
		acme-step respond -t http-01 -w elsewhere |
		acme-step finalize -K one.key.pem -o lost.pem"
	    [ $? = 77 ] && [ ! -e lost.pem ]'
done
check 'what stands on the pipe' '
    acme-step new-order blocked.test 2>err | cat >piped
    cat piped err
    sed "s/^acme-step: \([a-z-]*\): /failed 77 \1 /" err | diff - piped &&
    for step in order challenges "respond -t http-01 -w elsewhere"; do
	acme-step $step <piped 2>err | diff piped - && [ ! -s err ] || exit
    done'
check 'a step that is told of a failure does nothing' '
    acme-step finalize -K one.key.pem <piped >out 2>err
    [ $? = 77 ] && [ ! -s out ] && [ ! -s err ] &&
    acme-step order <piped >out 2>err
    [ $? = 77 ] && [ ! -s out ] && [ ! -s err ]'
dies 75 'pending.test' '
    acme-step new-order pending.test |
    acme-step finalize -T 3 -K one.key.pem'
dies 75 '' 'acme-step new-order stuck.test |
    acme-step order -W -T 2'
dies 77 '' 'acme-step certificate <l1'

group 'revocation'
check 'a certificate that is good' 'status_of one.pem | grep "\"Valid\""'
check 'revoke-cert' '
    acme-step revoke-cert one.pem && status_of one.pem >status &&
    cat status && [ "$(acme-step json Status status)" = Revoked ]'
dies 77 'alreadyRevoked' 'acme-step revoke-cert one.pem'
check 'a reason by its name' '
    acme-step revoke-cert -c superseded three.pem &&
    status_of three.pem >status && cat status &&
    [ "$(acme-step json Reason status)" = 4 ]'
check 'a reason by its number' '
    acme-step revoke-cert -c 5 wild.pem && status_of wild.pem >status &&
    cat status && [ "$(acme-step json Reason status)" = 5 ]'
dies 64 'reason' 'acme-step revoke-cert -c boredom ip.pem'
dies 66 'nowhere.pem' 'acme-step revoke-cert nowhere.pem'
dies 65 '' 'acme-step revoke-cert one.key.pem'

group 'signals'
# published COUNT: so many files are in the web server's directory.
published() {
	set -- "$1" "$www"/*
	[ -e "$2" ] || set -- "$1"
	[ $(($# - 1)) = "$1" ]
}
for signal in INT:130 TERM:143; do
	check "SIG${signal%:*} takes down what was published" '
	    acme-step new-order slow.test slower.test >slow || exit
	    start=$(date +%s)
	    env --default-signal acme-step respond -t http-01 -w "$www" \
		-s 30 <slow & pid=$!
	    await published 2 && kill -"${signal%:*}" $pid
	    wait $pid; got=$?
	    echo "status $got"
	    [ $got = "${signal#*:}" ] && published 0 &&
	    [ $(($(date +%s) - start)) -lt 15 ]'
done
check 'the web server may read what we publish' '
    umask 077
    acme-step respond -t http-01 -w "$www" -s 30 <slow & pid=$!
    await published 2; stat -c %a "$www"/* >modes
    kill $pid; wait $pid
    cat modes; [ "$(sort -u modes)" = 644 ]'
check 'the order can still be used' '
    acme-step respond -t http-01 -w "$www" -s 1 <slow |
    acme-step finalize -K one.key.pem -o slow.pem &&
    issued one.key.pem slow.pem DNS:slow.test DNS:slower.test'

group 'files'
check 'a key is private and never replaced' '
    (umask 0; acme-step key -o new.key.pem) &&
    [ "$(stat -c %a new.key.pem)" = 600 ]'
dies 73 'new.key.pem' 'acme-step key -o new.key.pem'
dies 73 'elsewhere/no/key.pem' 'acme-step key -o elsewhere/no/key.pem'
dies 64 '-o' 'acme-step key'
dies 66 'nowhere.pem' 'acme-step thumbprint -k nowhere.pem'
dies 66 'nowhere' 'acme-step new-order -a nowhere no.test'
check 'rsa4096' '
    acme-step key -t rsa4096 -o rsa4096.key.pem &&
    openssl pkey -in rsa4096.key.pem -check -noout -text | grep "4096 bit"'
dies 64 'rsa1024' 'acme-step key -t rsa1024 -o rsa1024.key.pem'

check 'a failure leaves the old output' '
    echo old >kept
    acme-step order -o kept </dev/null 2>err
    [ $? = 65 ] && [ "$(cat kept)" = old ] &&
    ls -A | not grep "kept."'
check 'success replaces it' '
    acme-step order -o kept <s1 && grep -x "status valid" kept &&
    ls -A | not grep "kept."'
dies 73 'nowhere' '
    acme-step respond -t http-01 -w nowhere <slow'

# Permissions are not for root.
mkdir locked && cp "$acme" locked/acme-step && chmod 555 locked &&
    chmod 755 "$tmp"
unprivileged() {
	if [ "$(id -u)" = 0 ]; then
		setpriv --reuid=65534 --regid=65534 --clear-groups "$@"
	else
		"$@"
	fi
}
dies 73 'locked/out' 'unprivileged locked/acme-step directory -o locked/out'
check 'nothing is asked before the output is open' '
    acme-step new-order -v -o nowhere/out no.test 2>err
    [ $? = 73 ] && not grep -i http err'

# full CODE...: run it where the directory full is a full file system.
mkdir full
full() {
	own=-rm
	[ "$(id -u)" != 0 ] || own=-m
	unshare $own sh -c "mount -t tmpfs -o size=16k none full || exit
	    dd if=/dev/zero of=full/x bs=4k 2>/dev/null
	    $*"
}
dies 74 'space' 'full "acme-step certificate -o full/chain.pem <s1"'
check 'nothing of it is left' '
    full "acme-step certificate -o full/chain.pem <s1 2>err; ls -A full" >ls
    echo x | diff - ls'
dies 74 'space' 'acme-step certificate <s1 >/dev/full'
dies 74 'f.pem' '
    trap "" XFSZ; ulimit -f 1; acme-step certificate -o f.pem <s1'
check 'nor of this' 'ls -A | not grep f.pem'

case $acme in
*-san)	# needs its libraries
	;;
*)	group 'FROM scratch'
	check 'the binary is static' '
	    readelf -lW "$acme" | not grep INTERP &&
	    readelf -dW "$acme" | not grep NEEDED'
	mkdir scratch && cp "$acme" scratch/acme-step && cp ca.pem scratch
	in_scratch() {
		if [ "$(id -u)" = 0 ]; then
			chroot scratch /acme-step "$@"
		else
			unshare -r chroot scratch /acme-step "$@"
		fi
	}
	check 'the only file of a container' '
	    ACME_DIRECTORY=https://127.0.0.1:$pebble/dir
	    ACME_CA_FILE=/ca.pem ACME_KEY=/account.pem
	    unset ACME_ACCOUNT
	    in_scratch key -o /account.pem &&
	    in_scratch key -o /key.pem &&
	    in_scratch new-account -y -o /account &&
	    in_scratch new-order -a /account scratch.test |
	    in_scratch challenges -t http-01 >scratch.order &&
	    publish <scratch.order &&
	    in_scratch respond <scratch.order |
	    in_scratch finalize -K /key.pem -o /chain.pem &&
	    issued scratch/key.pem scratch/chain.pem DNS:scratch.test; got=$?
	    rm -f "$www"/*; [ $got = 0 ]'
	;;
esac

group 'authorizations that are valid already'
pebble_stop
pebble_start PEBBLE_AUTHZREUSE=100
unset ACME_ACCOUNT
check 'the first order' '
    acme-step new-account -y >/dev/null &&
    acme-step new-order reuse.test |
    acme-step respond -t http-01 -w "$www" |
    acme-step finalize -K one.key.pem -o first.pem &&
    issued one.key.pem first.pem DNS:reuse.test'
check 'the challenges step has nothing to do' '
    acme-step new-order -o ready reuse.test &&
    grep -x "status ready" ready &&
    acme-step challenges <ready | not grep "^challenge"'
check 'nor has respond' '
    acme-step respond -t http-01 -w elsewhere <ready | grep -x "status ready"'
check 'no middle step' '
    acme-step new-order reuse.test |
    acme-step finalize -K one.key.pem -o second.pem &&
    issued one.key.pem second.pem DNS:reuse.test &&
    ! cmp -s first.pem second.pem'
pebble_stop
dies 69 'localhost.*refused' 'acme-step directory'
dies 69 'nowhere.invalid' 'acme-step directory -d https://nowhere.invalid/'

group 'the README works'
pebble_start
check 'its pipeline, as it stands' '
    mkdir readme && cd readme && unset ACME_KEY ACME_ACCOUNT &&
    (cd .. && quick_start) >quick && [ -s quick ] && cat quick &&
    sh -e quick && cp ../root.pem . &&
    openssl verify -CAfile root.pem -untrusted fullchain.pem fullchain.pem &&
    issued example.pem fullchain.pem DNS:example.com DNS:www.example.com'
pebble_stop

group 'the tree agrees with itself'

# section TITLE: that part of the README, without its indentation.
section() {
	awk -v title="$1" '/^[^ \t]/ { inside = $0 == title; next }
	    inside && NF { sub(/^[ \t]+/, ""); print }' "$src/README"
}
check 'the synopsis is what help prints' '
    acme-step help | sed -n "s/^[ \t]*\(acme-step .*\)/\1/p" >a && [ -s a ] &&
    section SYNOPSIS | diff a -'
check 'the exit statuses are those of the code' '
    sed -n "/^enum/,/^}/s/^[ \t]*[A-Z_]* *= \([67][0-9]\),.*/\1/p" \
	"$src/acme.c" | sort -u >a && [ -s a ] &&
    section "EXIT STATUS" | sed -n "s/^\([67][0-9]\)[ \t].*/\1/p" |
    sort -u | diff a -'
check 'each command has its paragraph in the README' '
    acme-step help | awk "{ print \$2 }" | grep "^[a-z]" | sort -u >a &&
    [ -s a ] && while read -r command; do
	section COMMANDS | grep "^$command\>" >/dev/null ||
	    { echo "no $command"; exit 1; }
    done <a'
check 'make install and uninstall' '
    cd "$src" && unset MAKEFLAGS && make PREFIX=/usr DESTDIR="$tmp/d" install &&
    cmp acme-step "$tmp/d/usr/bin/acme-step" &&
    make PREFIX=/usr DESTDIR="$tmp/d" uninstall &&
    find "$tmp/d" -type f | not grep .'
check 'no line is over 80 columns' '
    cd "$src" && for file in acme.c Makefile test.sh README; do
	expand "$file" | not grep -n ".\{81\}" || exit
    done'

echo "$((n - bad)) passed, $bad failed"
[ "$bad" = 0 ]
