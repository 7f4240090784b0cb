/* Anchor's 8-byte marks, as little-endian words: the first 8 bytes of SHA-256 of the quoted text. A test recomputes
 * them. */
#pragma once

#define IX_INIT_RUN 0x2a65dfe6ac796994ull /* "global:init_run" */
#define IX_MIGRATE 0x1ea29eec92e7ea9bull /* "global:migrate" */
#define IX_SET_CONFIG 0x423462d4af9a9e6cull /* "global:set_config" */
#define IX_SET_MODEL 0x9a7d7c9ca48c0bc9ull /* "global:set_model" */
#define IX_PAUSE 0x2fc1794afbdd16d3ull /* "global:pause" */
#define IX_RESUME 0xce8d207faa33a601ull /* "global:resume" */
#define IX_FINISH 0x25b6e97d84aa4a43ull /* "global:finish" */
#define IX_CLOSE_RUN 0xccab934a4c823d1full /* "global:close_run" */
#define IX_KICK 0xd213963eb9955cb8ull /* "global:kick" */
#define IX_BAN 0x42e3cefe8253ea9aull /* "global:ban" */
#define IX_SET_REWARD_RATE 0x2278263014bec9fdull /* "global:set_reward_rate" */
#define IX_AUTHORIZE 0x787189dbd266c1adull /* "global:authorize" */
#define IX_REVOKE 0xf25dad85221f17aaull /* "global:revoke" */
#define IX_DELEGATE 0x89045855b24b935aull /* "global:delegate" */
#define IX_JOIN 0xa311dc716a0237ceull /* "global:join" */
#define IX_READY 0x4bd17960493c7515ull /* "global:ready" */
#define IX_SET_SHARE 0x3d29a896a28acb88ull /* "global:set_share" */
#define IX_COMMIT 0x4a9cd0e5a58e8cdfull /* "global:commit" */
#define IX_ATTEST 0xa0758b9077789453ull /* "global:attest" */
#define IX_CHECKPOINT 0xfcb88ff0cc13c8d5ull /* "global:checkpoint" */
#define IX_LEAVE 0x70ad956b6c94ea3bull /* "global:leave" */
#define IX_ARCHIVE 0x6bb593565044bf10ull /* "global:archive" */
#define IX_RESTORE 0x3a06238b807a254dull /* "global:restore" */
#define IX_RECLAIM 0xbaa36d91f9ecb12cull /* "global:reclaim" */
#define IX_CLAIM 0xd26c9fd5c1d6c63eull /* "global:claim" */
#define IX_TICK 0x0f3f5065082c4f5cull /* "global:tick" */

#define ACCOUNT_RUN 0xbdf673eb569b36c7ull /* "account:Run" */
#define ACCOUNT_MEMBERS 0x757cf2f07e33f912ull /* "account:Members" */
#define ACCOUNT_ROUNDS 0xc946d0e6132a15f0ull /* "account:Rounds" */
#define ACCOUNT_GRANT 0x36cd87cccd0ba6a1ull /* "account:Grant" */
#define ACCOUNT_RECEIPT 0x999166506a499a27ull /* "account:Receipt" */

#define EVENT_RUN_CREATED 0xafc885c6cc060971ull /* "event:RunCreated" */
#define EVENT_RUN_CLOSED 0xc735fa2b22b79fd1ull /* "event:RunClosed" */
#define EVENT_CONFIG_REQUESTED 0x553447291d0bf605ull /* "event:ConfigRequested" */
#define EVENT_CONFIG_CHANGED 0xc04e4d6262561993ull /* "event:ConfigChanged" */
#define EVENT_MODEL_CHANGED 0x5708f908b10f47b5ull /* "event:ModelChanged" */
#define EVENT_MEMBER_JOINED 0xd2bfcbc15895c79cull /* "event:MemberJoined" */
#define EVENT_MEMBER_READY 0x518ef8924fe888f0ull /* "event:MemberReady" */
#define EVENT_MEMBER_LEFT 0x8e85e36f5c485330ull /* "event:MemberLeft" */
#define EVENT_MEMBER_ARCHIVED 0x2e6c1a5ab5a36e91ull /* "event:MemberArchived" */
#define EVENT_MEMBER_RESTORED 0x6151dc10d2224061ull /* "event:MemberRestored" */
#define EVENT_AUTHORIZED 0x80067665fd672e76ull /* "event:Authorized" */
#define EVENT_REVOKED 0x4100b87c6394d871ull /* "event:Revoked" */
#define EVENT_COMMITTED 0xe28f6f1d56a29e46ull /* "event:Committed" */
#define EVENT_ATTESTED 0x3260c5dcc77166b8ull /* "event:Attested" */
#define EVENT_PHASE_CHANGED 0xdbd524d0de43c9b2ull /* "event:PhaseChanged" */
#define EVENT_ROUND_STARTED 0x78aa30eef402d1b4ull /* "event:RoundStarted" */
#define EVENT_ROUND_FINAL 0x0567199593d70d00ull /* "event:RoundFinal" */
#define EVENT_MEMBERS_DROPPED 0x3926c94a7cb3409cull /* "event:MembersDropped" */
#define EVENT_MEMBERS_DESYNCED 0x10de943201950119ull /* "event:MembersDesynced" */
#define EVENT_MEMBERS_EJECTED 0x5b59cdc4caa71f1bull /* "event:MembersEjected" */
#define EVENT_CHECKPOINT_AGREED 0xac78d6d438eb3842ull /* "event:CheckpointAgreed" */
#define EVENT_REWARD_PAID 0x5f13b1d775bea084ull /* "event:RewardPaid" */
