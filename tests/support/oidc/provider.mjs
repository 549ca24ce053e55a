// The certified oidc-provider on loopback, as an issuer of access tokens for machines.
//
//   node provider.mjs PATH_OF_ITS_MODULE
//
// Prints one line of JSON, {"url"}, once it listens. A line `rotate` on stdin replaces its signing key, as an
// issuer does that shows the next key before it signs with it; `withdraw` takes the old keys away. Each is
// answered by a line with the `kid`s shown. It ends when stdin does.

import { createServer } from 'node:http';
import { generateKeyPairSync, randomUUID } from 'node:crypto';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

const { default: Provider } = await import(pathToFileURL(process.argv[2]).href);

const newKey = () => {
  const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
  return { ...privateKey.export({ format: 'jwk' }), kid: randomUUID(), alg: 'RS256', use: 'sig' };
};
let keys = [newKey()];

const client = (id) => ({
  client_id: id,
  client_secret: 'secret',
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
});

const configure = () => ({
  jwks: { keys },
  clients: [client('alice'), client('olga')],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (ctx, audience) => ({
        scope: 'sessions',
        audience,
        accessTokenFormat: 'jwt',
        accessTokenTTL: 300,
        jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
  // Keycloak's shape.
  extraTokenClaims: (ctx, token) => ({
    sub: token.clientId,
    realm_access: { roles: token.clientId === 'olga' ? ['outwake-operator'] : ['offline_access'] },
  }),
});

let serve = (request, response) => response.end();
const server = createServer((request, response) => serve(request, response));
server.listen(0, '127.0.0.1', () => {
  const url = `http://127.0.0.1:${server.address().port}`;
  const start = () => {
    serve = new Provider(url, configure()).callback();
  };
  const say = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);
  start();
  say({ url });
  const lines = createInterface({ input: process.stdin });
  lines.on('line', (line) => {
    keys = line === 'rotate' ? [newKey(), ...keys] : keys.slice(0, 1);
    start();
    say({ keys: keys.map((key) => key.kid) });
  });
  lines.on('close', () => process.exit(0));
});
