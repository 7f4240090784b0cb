/* Anchor's 8-byte marks, as little-endian words: the first 8 bytes of SHA-256 of the quoted text. A test recomputes
 * them. */
#pragma once

#define IX_INIT_RUN 0x2a65dfe6ac796994ull /* "global:init_run" */
#define IX_JOIN 0xa311dc716a0237ceull /* "global:join" */
#define IX_READY 0x4bd17960493c7515ull /* "global:ready" */
#define IX_COMMIT 0x4a9cd0e5a58e8cdfull /* "global:commit" */
#define IX_ATTEST 0xa0758b9077789453ull /* "global:attest" */
#define IX_TICK 0x0f3f5065082c4f5cull /* "global:tick" */
#define IX_CHECKPOINT 0xfcb88ff0cc13c8d5ull /* "global:checkpoint" */
#define IX_LEAVE 0x70ad956b6c94ea3bull /* "global:leave" */

#define ACCOUNT_RUN 0xbdf673eb569b36c7ull /* "account:Run" */
#define ACCOUNT_MEMBERS 0x757cf2f07e33f912ull /* "account:Members" */
#define ACCOUNT_ROUNDS 0xc946d0e6132a15f0ull /* "account:Rounds" */

#define EVENT_RUN_CREATED 0xafc885c6cc060971ull /* "event:RunCreated" */
#define EVENT_MEMBER_JOINED 0xd2bfcbc15895c79cull /* "event:MemberJoined" */
#define EVENT_MEMBER_READY 0x518ef8924fe888f0ull /* "event:MemberReady" */
#define EVENT_MEMBER_LEFT 0x8e85e36f5c485330ull /* "event:MemberLeft" */
#define EVENT_COMMITTED 0xe28f6f1d56a29e46ull /* "event:Committed" */
#define EVENT_ATTESTED 0x3260c5dcc77166b8ull /* "event:Attested" */
#define EVENT_PHASE_CHANGED 0xdbd524d0de43c9b2ull /* "event:PhaseChanged" */
#define EVENT_ROUND_STARTED 0x78aa30eef402d1b4ull /* "event:RoundStarted" */
#define EVENT_ROUND_FINAL 0x0567199593d70d00ull /* "event:RoundFinal" */
#define EVENT_MEMBERS_DROPPED 0x3926c94a7cb3409cull /* "event:MembersDropped" */
#define EVENT_MEMBERS_DESYNCED 0x10de943201950119ull /* "event:MembersDesynced" */
#define EVENT_CHECKPOINT_AGREED 0xac78d6d438eb3842ull /* "event:CheckpointAgreed" */

